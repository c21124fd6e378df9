"""fxquant in transformers: `from_pretrained(path, quantization_config=FxQuantConfig("int4"))`, `save_pretrained`.

    from fxquant import FxQuantConfig

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FxQuantConfig("int4"), device_map="auto")
    model.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)

Each weight is quantized as it is loaded, so the model never exists in full precision. What `save_pretrained` writes is
read by a plain `from_pretrained` in every process that has imported this module, as `from fxquant import FxQuantConfig`
does. In any other process it is refused: beside the planes of each module stands one byte under the name of the weight,
a tensor of a shape that transformers does not accept; without it, the weight would be filled with random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from fxquant.checkpoint_files import TensorHeader
from fxquant.errors import FileError, ModelError
from fxquant.expert_modules import QExperts
from fxquant.install import record_of, uninstall
from fxquant.integrations.arrivals import Arrivals
from fxquant.integrations.checkpoint_checks import check_planes, for_model, headers_of, refuse_packed
from fxquant.integrations.model_parts import mark_initialised, quantized_tensors
from fxquant.integrations.recipe_data import recipe_from
from fxquant.integrations.transformers_config import NAME, FxQuantConfig
from fxquant.model_files import put_quantized
from fxquant.model_index import FORMAT, quantized_modules
from fxquant.modules import QLinear
from fxquant.planning import plan_for
from fxquant.rewrite import History
from fxquant.transformers_weights import replaced_parameters, untie

__all__ = ["FxQuantConfig", "FxQuantizer"]
_LOADED = "the weights were quantized one by one while transformers loaded them: no pass has run over a graph"


class FxQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model."""

    requires_calibration = False
    quantization_config: FxQuantConfig

    def __init__(self, quantization_config: FxQuantConfig, **kwargs: Any) -> None:
        """Keep a config of its own: one object may be given to load several models."""
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._dtype = torch.get_default_dtype()
        self._arrivals: Arrivals | None = None
        self._planes: set[str] = set()  # names of those that a quantized checkpoint has
        self._conversions: list[Any] | None = None

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model."""
        return True

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to offload to disk what is quantized at that moment.

        Raises:
            ModelError: `device_map` has "disk" in it.
        """
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError(
                "device_map puts a part of the model on disk, where nothing can be quantized\n"
                "  quantize on the CPU and save_pretrained first, then load that"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype stays as it is asked for."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        headers = headers_of(kwargs.get("checkpoint_files"))
        with _plain_torch():
            if self.pre_quantized:
                self._put_quantized(model, headers)
            else:
                refuse_packed(headers)
                self._plan(model)

    def _plan(self, model: Any) -> None:
        with _tied(model):
            _, made = plan_for(model, recipe_from(self.quantization_config.recipe))
        gc.collect()  # what torch.export makes refers to itself in circles, and to modules
        static = [e for e in made.quantized if e.scheme and e.scheme.activation and e.scheme.activation.static]
        if static:
            raise ModelError(
                f"{len(static)} of {len(made.quantized)} layers have static activation scales, which take calibration, "
                f"{static[0].name} first\n"
                "  load the model as it is, then fxquant.quantize(model, recipe, calibration=batches)"
            )
        self._arrivals = Arrivals(model, made, History(reason=_LOADED), self._dtype, model.all_tied_weights_keys)

    def _put_quantized(self, model: Any, headers: Mapping[str, TensorHeader]) -> None:
        put_quantized(model, for_model(self.quantization_config.index(), model, self._dtype))
        wanted = quantized_tensors(model)
        check_planes(wanted, headers, model.base_model_prefix)
        self._planes = {name for name, tensor in wanted.items() if not isinstance(tensor, nn.Parameter)}
        for module in model.modules():
            if isinstance(module, (QLinear, QExperts)):
                mark_initialised(module)
        markers = "|".join(re.escape(name) for name in replaced_parameters(model))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"^(?:{markers})$"}
        untie(model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be quantized when it comes."""
        return self._arrivals is not None and self._arrivals.awaits(param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element that a parameter will take; by these, `device_map="auto"` places modules."""
        size = self._arrivals.element_size(param_name) if self._arrivals is not None else None
        return param.element_size() if size is None else size

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leave room on every accelerator for the largest weight in full precision, twice."""
        room = 2 * self._arrivals.largest if self._arrivals is not None else 0
        return {key: v if key in ("cpu", "disk") else max(v - room, 0) for key, v in max_memory.items()}

    def get_quantize_ops(self) -> ConversionOps:
        """What the loader runs on a parameter that is to be quantized."""
        assert self._arrivals is not None
        return _Quantize(self._arrivals)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """To which dtype a tensor of a quantized checkpoint is cast; a plane is not."""
        if converter.target_patterns[0] in self._planes:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """A quantized checkpoint has the names of the model: nothing in it is renamed or stacked."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._arrivals is not None:
            self._arrivals.finish()
        else:
            _check_members(model)
        self._arrivals, self._planes = None, set()
        self._take(model)

    def _take(self, model: Any) -> None:
        """Make `save_pretrained` ask for what is to be written."""
        untie(model)
        self._describe(model)
        # Checkpoints of some models have other names than the model; no name of a plane is to be taken for one of them.
        self._conversions, model._weight_conversions = getattr(model, "_weight_conversions", None), []

    def _describe(self, model: Any) -> None:
        config = self.quantization_config
        config.modules, config.format = {"model": type(model).__name__, **quantized_modules(model)}, FORMAT

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` is to write: all tensors, and a marker in place of each weight that is planes."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of the adapters alone
        self._describe(model)
        markers = {name: torch.zeros(1, dtype=torch.uint8) for name in replaced_parameters(model)}
        if not markers:  # fxquant.dequantize was called on it
            self._forget(model)
            return None, {}
        return {**model.state_dict(), **markers}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        names = [name for name, module in model.named_modules() if isinstance(module, (QLinear, QExperts))]
        uninstall(model)
        for name in names:
            model.get_submodule(name).to(dtype)
        self._forget(model)
        return model

    def _forget(self, model: Any) -> None:
        model._weight_conversions = self._conversions or None
        base: Any = super()
        base.remove_quantization_config(model)


def attach(model: Any) -> None:
    """Let `save_pretrained` of a model that was quantized in memory write what `from_pretrained` reads.

    Args:
        model: of transformers, quantized; one that `from_pretrained` quantized stays as it is.
    """
    if isinstance(getattr(model, "hf_quantizer", None), FxQuantizer) or not replaced_parameters(model):
        return
    record = record_of(model)
    config = FxQuantConfig(None if record is None else record.plan.recipe, modules={})
    quantizer = FxQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    quantizer._take(model)


def detach(model: Any) -> None:
    """Undo `attach`, on a model in which nothing is quantized any more."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, FxQuantizer):
        quantizer._forget(model)


class _Quantize(ConversionOps):
    """The op of the loader: takes the parameters that become planes out of those that it is to set."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        missing_keys: set[str] = kwargs["missing_keys"]
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: value for name, value in found.items() if not self.arrivals.take(name, value, missing_keys)}


def _check_members(model: nn.Module) -> None:
    """The experts of each stack, which the op takes as an index, are those that the config tells."""
    for name, module in model.named_modules():
        problem = module.members_problem() if isinstance(module, QExperts) else None
        if problem:
            raise FileError(f"the checkpoint contradicts its config: {name}: {problem}")


@contextlib.contextmanager
def _tied(model: Any) -> Iterator[None]:
    """Tie weights for as long as it takes to plan; transformers does so when all are loaded."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for target, source in model.all_tied_weights_keys.items():
        path, _, leaf = target.rpartition(".")
        owner = model.get_submodule(path)
        kept.append((owner, leaf, owner.get_parameter(leaf)))
        owner._parameters[leaf] = model.get_parameter(source)
    try:
        yield
    finally:
        for owner, leaf, parameter in kept:
            owner._parameters[leaf] = parameter


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """What `from_pretrained` sets for the time in which it builds a model, default device and dtype, set back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _register() -> None:
    """Tell transformers; also when this module is executed a second time."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(NAME, None)
    AUTO_QUANTIZER_MAPPING.pop(NAME, None)
    register_quantization_config(NAME)(FxQuantConfig)
    register_quantizer(NAME)(FxQuantizer)


_register()
