"""`FxQuantConfig`: what `from_pretrained` takes, and what stands in the `config.json` of a quantized checkpoint."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fxquant.errors import FileError
from fxquant.integrations.recipe_data import recipe_data
from fxquant.model_index import FORMAT, Index, index_from

NAME = "fxquant"


class FxQuantConfig(QuantizationConfigMixin):
    """How `from_pretrained` is to quantize; in `config.json`, how the weights beside it are quantized.

    Attributes:
        recipe: the recipe as plain data, or the name of a preset.
        modules: schemes and dtypes of all that is quantized; None: nothing is, yet.
        format: version of `modules`.
    """

    quant_method: Any
    recipe: Any
    modules: dict[str, Any] | None
    format: int

    def __init__(
        self,
        recipe: Any = "int4",
        modules: dict[str, Any] | None = None,
        *,
        format: int = FORMAT,
        quant_method: str = NAME,
    ) -> None:
        """Check the recipe.

        Args:
            recipe: anything that `fxquant.quantize` takes for one.
            modules: what was written to a `config.json`; not to be given by hand.
            format: likewise.
            quant_method: likewise.

        Raises:
            RecipeError: a recipe that cannot be read.
            SchemeError: an unknown scheme.
            FileError: a recipe in a file that cannot be read.
        """
        self.quant_method = NAME
        self.recipe = recipe_data(recipe) if modules is None else recipe
        self.modules, self.format = modules, format

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a `config.json` holds.

        Raises:
            FileError: it has keys that this version does not know.
        """
        unknown = set(config_dict) - {"recipe", "modules", "format", "quant_method"}
        if unknown:
            raise FileError(
                f"the quantization_config has keys that this version of fxquant does not know: {sorted(unknown)[:5]}\n"
                f"  it has the format {config_dict.get('format')!r}; this version reads format {FORMAT}"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def index(self) -> Index:
        """What is quantized, and how.

        Raises:
            FileError: it does not say, or not as a reader of this version understands.
        """
        if not isinstance(self.modules, dict):
            raise FileError(
                "the quantization_config of this checkpoint does not tell which modules are quantized\n"
                "  a directory that fxquant itself wrote is read by fxquant.load"
            )
        data = {**self.modules, "format": self.format, "shared": {}}
        return index_from(data, "the quantization_config of this checkpoint")
