"""`QLinear`: a linear whose weight is stored as the planes of a scheme. The only quantized linear there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.op_arguments import refuse_tangents
from fxquant.ops import ABI
from fxquant.scheme import Scheme

_OWN = frozenset({"spelling", "plane_names", "dtype", "origin", "transposed", "trainable"})
"""QLinear's own attributes: what stays behind when a module takes over another's."""
_INTERNALS = frozenset(nn.Module().__dict__)
"""Attributes that every nn.Module has: parameters, buffers, hooks, the training flag."""
_HOOKS = frozenset(name for name in _INTERNALS if "hook" in name)
_LEFT_BEHIND = _INTERNALS | _OWN | {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}
"""`_compiled_call_impl` is what `module.compile()` made of the old code; the three before it are accelerate's, see
`follow_device_hook`."""


class QLinear(nn.Linear):
    """`y = x @ W.T + b` with W `[out_features, in_features]` stored as planes, which are plain buffers.

    Where the scheme quantizes activations, x is what is left of the input when it is rounded as the scheme says.

    It is an `nn.Linear` to whoever asks (PEFT, `isinstance`), and `.weight` gives the dequantized weight, made anew at
    each access. `.to(dtype)` changes the dtype of `.weight` and of the bias, never that of a plane.

    Attributes:
        spelling: the spelling of the scheme, as the op takes it.
        dtype: dtype of `.weight`; the computation runs in the dtype of the input.
        origin: class of the module that this one replaced; `restore` builds it again.
        transposed: whether that module stores its weight as `[in_features, out_features]`, as GPT-2's Conv1D does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the module with planes that hold nothing yet; see `load_planes`.

        Raises:
            SchemeError: when an `[out_features, in_features]` weight does not fit the scheme.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.spelling, self.dtype = str(scheme), dtype
        self.origin: type[nn.Module] = nn.Linear
        self.transposed, self.trainable = False, False
        specs = scheme.planes(out_features, in_features)
        self.plane_names = tuple(specs)
        for name, spec in specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def replacing(cls, module: nn.Module, scheme: Scheme, *, transposed: bool = False) -> QLinear:
        """The module that takes the place of `module`: planes on the meta device, everything else taken over.

        Bias (the same Parameter), hooks (the same dictionaries, so that handles still remove them), training flag and
        any attribute that somebody set on the module are kept.
        """
        weight = module.get_parameter("weight")
        n, k = reversed(weight.shape) if transposed else weight.shape
        bias = module.bias if isinstance(module.bias, nn.Parameter) else None
        new = cls(k, n, scheme, bias=bias, dtype=weight.dtype, device="meta")
        new.origin, new.transposed, new.trainable = type(module), transposed, weight.requires_grad
        _take_over(new, module)
        return new

    @property
    def scheme(self) -> Scheme:
        """How the weight is stored."""
        return Scheme.parse(self.spelling)

    @property
    def planes(self) -> dict[str, Tensor]:
        """The planes by name, in the order in which ops take them."""
        return {name: getattr(self, name) for name in self.plane_names}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight `[out_features, in_features]` in `dtype`, a new tensor at each access."""
        result: Tensor = torch.ops.fxquant.dequantize(
            list(self.planes.values()), self.spelling, self.out_features, self.in_features, self.dtype, ABI
        )
        return result.t() if self.transposed else result

    def load_planes(self, planes: Mapping[str, Tensor]) -> None:
        """Take these planes as the weight.

        Raises:
            ModelError: when names, shapes or dtypes are not those of the scheme.
        """
        specs = self.scheme.planes(self.out_features, self.in_features)
        found = {name: (tuple(plane.shape), plane.dtype) for name, plane in planes.items()}
        wanted = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        if found != wanted:
            raise ModelError(f"these are not planes of {self.spelling}\n  got: {found}\n  expected: {wanted}")
        for name in self.plane_names:
            self._buffers[name] = planes[name]

    def forward(self, input: Tensor) -> Tensor:
        """`x @ W.T + b` for x `[..., in_features]`, in the dtype of x: the op `fxquant::linear`.

        Raises:
            ModelError: when x has other features, or a forward-mode derivative is wanted.
        """
        biases = [] if self.bias is None else [self.bias]
        refuse_tangents([input, *biases])
        planes = [getattr(self, name) for name in self.plane_names]
        result: Tensor = torch.ops.fxquant.linear(input, planes, biases, self.spelling, [self.out_features], ABI)
        return result

    def restore(self) -> nn.Module:
        """The module that this one replaced, of its own class, with the dequantized weight."""
        new = self.origin.__new__(self.origin)
        nn.Module.__init__(new)
        _take_over(new, self)
        weight = self.weight.contiguous()
        new.register_parameter("weight", nn.Parameter(weight, requires_grad=self.trainable))
        new.register_parameter("bias", self.bias)
        return new

    def reset_parameters(self) -> None:
        """Refuse: planes are made from a trained weight, they cannot be initialised.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"a {self.spelling} QLinear cannot be initialised at random: call dequantize(model) first")

    def extra_repr(self) -> str:
        """Sizes, bias and scheme, as `print(model)` shows them."""
        bits = self.scheme.bits_per_weight(max(self.out_features, 1), max(self.in_features, 1))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.spelling}, {bits:.3g} bits per weight"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        planes = {id(plane) for plane in self.planes.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in planes or moved.dtype == tensor.dtype else tensor.to(moved.device)

        probe = torch.empty(0, dtype=self.dtype, device=getattr(self, self.plane_names[0]).device)
        nn.Module._apply(self, keep_dtype, recurse)
        self.dtype = fn(probe).dtype
        return self


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the hooks, the training flag and the plain attributes of `old`."""
    for name, value in old.__dict__.items():
        if name in _HOOKS or name not in _LEFT_BEHIND:
            new.__dict__[name] = value
    new.training = old.training


def follow_device_hook(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the hook by which accelerate (`device_map`) moves the inputs of `old` to its device.

    accelerate wraps `forward` on the instance; its own function makes the same wrapping on the new module.
    """
    hook: Any = old.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
