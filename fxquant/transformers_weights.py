"""How transformers names and stacks the weights of its models: its conversion of checkpoint names, from one place.

Uses `transformers.core_model_loading` and `conversion_mapping` (5.23), which `from_pretrained` itself runs on.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import FileError
from fxquant.expert_layouts import expert_name
from fxquant.expert_modules import QExperts
from fxquant.experts import ExpertSite, find_experts
from fxquant.linears import find_linears
from fxquant.modules import QLinear
from fxquant.pretrained import as_file_error, no_progress_bars


@dataclass(frozen=True)
class Names:
    """Where the weights of a checkpoint go in a model of transformers."""

    model: Any
    """Without weights."""
    _alone: threading.Lock = field(default_factory=threading.Lock)
    """`convert` puts tensors into the model and takes them out again."""

    @cached_property
    def _transforms(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        found = get_model_conversion_mapping(self.model)
        converters = [one for one in found if isinstance(one, WeightConverter)]
        return [one for one in found if one not in converters], converters

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = self.model.state_dict(keep_vars=True)
        return tensors

    @cached_property
    def _linears(self) -> dict[str, str]:
        return {alias: site.name for site in find_linears(self.model) for alias in site.aliases}

    @cached_property
    def _sites(self) -> list[ExpertSite]:
        return find_experts(self.model)

    @cached_property
    def _experts(self) -> dict[str, str]:
        return {
            expert_name(alias, e, p.name): expert_name(site.name, e, p.name)
            for site in self._sites
            for alias in site.aliases
            for _, e, p in site.linears()
        }

    def of_matrix(self, name: str) -> str | None:
        """What the model calls a matrix: the name of a linear, or of one matrix of one expert; None where it has none.

        Args:
            name: as the checkpoint has it, without `.weight`.
        """
        for own in (name, self.renamed(f"{name}.weight")[0].removesuffix(".weight")):
            found = self._linears.get(own) or self._experts.get(own)
            if found:
                return found
        return self._stacked(name)

    def renamed(self, key: str) -> tuple[str, str | None]:
        """What the model calls a tensor, and the pattern by which transformers converts it with others, if it does.

        Args:
            key: as the checkpoint has it. One that becomes several tensors has the name of the first.
        """
        from transformers.core_model_loading import rename_source_key

        result: tuple[str, str | None] = rename_source_key(
            key, *self._transforms, self.model.base_model_prefix, self._tensors
        )
        return result

    def _stacked(self, name: str) -> str | None:
        """A matrix that transformers would stack with others of its kind: `...block_sparse_moe.experts.5.w1`."""
        key, source = self.renamed(f"{name}.weight")
        if source is None:
            return None
        owner, _, parameter = key.rpartition(".")
        site = next((site for site in self._sites if owner in site.aliases), None)
        numbers = re.findall(r"\.experts\.(\d+)\.", f"{name}.weight")
        converter = next(one for one in self._transforms[1] if source in one.source_patterns)
        if site is None or len(numbers) != 1:
            return None
        parts, part = site.layout.parts(parameter), list(converter.source_patterns).index(source)
        if part >= len(parts) or int(numbers[0]) >= site.layout.experts:
            return None
        return expert_name(site.name, int(numbers[0]), parts[part].name)

    def load(self, tensors: Mapping[str, Any], device: torch.device) -> tuple[set[str], set[str]]:
        """Put tensors that are no planes into the model as `from_pretrained` does: renamed, stacked, cast, tied.

        Args:
            tensors: by their names in the checkpoint; tensors, or slices of safetensors files.
            device: where they go.

        Returns:
            Names of tensors of the model that are missing, and of tensors that the model does not have; without those
            that its class is known to do without.

        Raises:
            FileError: some have other shapes than the model's, or cannot be converted.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        renamings, converters = self._transforms
        config = LoadStateDictConfig(
            dtype=self.model.dtype,
            weight_mapping=[*renamings, *converters],
            device_map={"": device},
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
        )
        with as_file_error("the tensors cannot be loaded"), torch.no_grad(), no_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
            if info.mismatched_keys or info.conversion_errors:
                raise FileError(_fault(info))
            self.model.tie_weights(recompute_mapping=False)
            self.model._adjust_missing_and_unexpected_keys(info)
        # A norm that is missing is no empty tensor: the skeleton has made it, of ones.
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        return set(info.missing_keys) - tied - _planes(self.model), set(info.unexpected_keys)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors become that transformers converts together; the model stays as it is.

        Args:
            tensors: all that belong together, by their names in the checkpoint; on the meta device or any other.

        Returns:
            Tensors of the model, by name, on the same device.

        Raises:
            FileError: they have other shapes than the model's, or cannot be converted.
        """
        with self._alone:
            self.model.tie_weights(recompute_mapping=False)
            before = dict(self.model.state_dict(keep_vars=True))
            try:
                self.load(tensors, next(iter(tensors.values())).device)
                after = self.model.state_dict(keep_vars=True)
                return {name: tensor.detach() for name, tensor in after.items() if tensor is not before[name]}
            finally:
                for name, tensor in before.items():
                    owner, _, leaf = name.rpartition(".")
                    module = self.model.get_submodule(owner)
                    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor


def replaced_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that a model would have if nothing of it were quantized, and does not have."""
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QLinear):
            names.append(f"{name}.weight")
        elif isinstance(module, QExperts):
            stored = {stack.parameter for stack in module.stacks if not stack.whole}
            names += [f"{name}.{parameter}" for parameter in sorted(stored)]
    return names


def untie(model: Any) -> None:
    """Nothing is tied to a weight that is planes, though the class of the model may have it so."""
    own = set(replaced_parameters(model))
    ties = getattr(model, "all_tied_weights_keys", None)
    if ties:
        left = {target: source for target, source in ties.items() if not own & {target, source}}
        model.all_tied_weights_keys = left


def _fault(info: Any) -> str:
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        return f"{name} cannot be made of the tensors in the files: {' '.join(str(text).split())[:300]}"
    name, found, wanted = sorted(info.mismatched_keys)[0]
    return f"{name} is {list(found)} in the files; the model that the config describes has {list(wanted)}"


def _planes(model: nn.Module) -> set[str]:
    """Tensors that are in place before the others are loaded."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            found |= {f"{name}.{plane}" for plane in module.plane_names}
        elif isinstance(module, QExperts):
            found |= {f"{name}.{tensor}" for stack in module.stacks if not stack.whole for tensor in stack.tensors}
    return found
