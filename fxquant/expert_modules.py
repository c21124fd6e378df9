"""`QExperts`: experts whose weights are stored as stacked planes. The only quantized experts there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fxquant.codecs import dequantize
from fxquant.errors import ModelError
from fxquant.expert_containers import ExpertsContainer
from fxquant.expert_forwards import gates_with_silu, is_silu
from fxquant.expert_layouts import ExpertsLayout, Projection, as_stack
from fxquant.expert_matmul import PLAIN
from fxquant.expert_ops import ABI
from fxquant.expert_stacks import Schemes, Stack, joined, pair_of, stacks_of
from fxquant.op_arguments import refuse_tangents
from fxquant.scheme import Scheme


class QExperts(ExpertsContainer):
    """Takes the place of a module of stacked experts: what that computes, with weights that are stored as planes.

    Each stack of planes holds the weights of one projection, or of all that share a parameter, for the experts that
    have one scheme: mostly all experts, in one stack. Planes are plain buffers, `[S, ...]`, called
    `<parameter or projection>_<plane>`. Matrices that stay as they are, are parameters of the same kind; where nothing
    of a parameter is quantized, it is the module's own, and so are biases.

    How transformers runs experts (`set_experts_implementation`, the switching in `generate`) is set in the config,
    which is not looked at here. `.to(dtype)` changes the dtype of `weight_of`, of biases and of matrices that stay as
    they are, never that of a plane.

    Attributes:
        stacks: which weights are stored together.
        dtype: dtype of `weight_of`; the computation runs in the dtype of the input.
        trainable: of each parameter that is held otherwise, whether it had a gradient.
        pair: the stacks of gate and up and of down, if these are all there are, for `fxquant::gated_experts`.
    """

    def __init__(self, module: nn.Module, layout: ExpertsLayout, schemes: Schemes) -> None:
        """Make a container with planes that hold nothing yet, on the meta device; see `load_planes`.

        Args:
            module: what it is to stand for; stays as it is.
            layout: where that holds its experts.
            schemes: how to store each matrix, by expert and projection; those without a scheme stay as they are.

        Raises:
            ModelError: a scheme is given for a matrix that there is not.
            SchemeError: a scheme cannot hold a matrix.
        """
        stacks = stacks_of(module, layout, schemes)
        super().__init__(module, layout)
        self.stacks = stacks
        self.dtype = module.get_parameter(stacks[0].parameter).dtype
        self.trainable = {name: module.get_parameter(name).requires_grad for name in self.stack_shapes}
        self.pair = pair_of(stacks, layout) if gates_with_silu(module, layout) else None
        for bias in dict.fromkeys(p.bias for p in layout.projections if p.bias):
            self.register_parameter(_flat(bias), module.get_parameter(bias))
        for stack in stacks:
            self._hold(stack, module.get_parameter(stack.parameter))

    def _hold(self, stack: Stack, parameter: nn.Parameter) -> None:
        if stack.whole:
            self.register_parameter(_flat(stack.parameter), parameter)
            return
        for name, spec in stack.specs(stack.n, parameter.dtype).items():
            empty = torch.empty(len(stack.experts), *spec.shape, dtype=spec.dtype, device="meta")
            if stack.scheme == PLAIN:
                self.register_parameter(stack.tensor(name), nn.Parameter(empty, parameter.requires_grad))
            else:
                self.register_buffer(stack.tensor(name), empty)
        if len(stack.experts) < self.layout.experts:
            # On no meta device: which experts these are is known before their planes are there.
            members = torch.tensor(stack.experts, device=parameter.device)
            self.register_buffer(stack.tensor("experts"), members)

    def project(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        """As `ExpertsContainer.project`: the op `fxquant::experts`, once per stack.

        Raises:
            ModelError: a forward-mode derivative is wanted.
        """
        parts = self.layout.parts(name)
        if not parts:
            parts = (self.layout.projection(name),)
        ids = ids.to(torch.int64)
        joint: Tensor | None = None
        single: dict[str, Tensor] = {}
        for stack in self.stacks:
            if stack.parameter != parts[0].parameter:
                continue
            if len(stack.projections) > 1:
                y = self._multiply(stack, x, ids)
                y = y if len(parts) > 1 else y[..., parts[0].rows(y.shape[-1])]
                joint = y if joint is None else joint + y
            elif stack.projections[0] in parts:
                y = self._multiply(stack, x, ids)
                key = stack.projections[0].name
                # Each slot has its expert in one stack, and zeros from all others.
                single[key] = y if key not in single else single[key] + y
        if not single:
            assert joint is not None
            return joint
        rest = joined([single[p.name] for p in parts], parts)
        return rest if joint is None else joint + rest

    def gated(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """As `ExpertsContainer.gated`: the op `fxquant::gated_experts`, on a CPU without a gradient.

        Raises:
            ModelError: a forward-mode derivative is wanted.
        """
        # However many tokens there are: a graph must not depend on it.
        if self.pair is None or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        if x.dim() != 2 or ids.dtype != torch.int64 or not is_silu(self):
            return None
        first, second = self.pair
        planes = [[getattr(self, stack.tensor(name)) for name in stack.planes] for stack in self.pair]
        refuse_tangents([x, weights])
        result: Tensor = torch.ops.fxquant.gated_experts.default(
            x, ids, weights, *planes, first.scheme, second.scheme, second.k, self.layout.experts, ABI
        )
        return result.to(x.dtype)

    def _multiply(self, stack: Stack, x: Tensor, ids: Tensor) -> Tensor:
        name = stack.projections[0].bias
        biases = [] if name is None else [getattr(self, _flat(name))]
        biases = [bias[:, stack.bias_rows(bias.shape[1])] for bias in biases]
        count = len(stack.experts)
        if count < self.layout.experts:
            members = getattr(self, stack.tensor("experts"))
            biases = [b.index_select(0, members) for b in biases]
            places = ids.new_full((self.layout.experts + 1,), -1)
            places = places.index_copy(0, members, torch.arange(count, device=ids.device))
            absent = (ids < 0) | (ids >= self.layout.experts)
            ids = places[torch.where(absent, self.layout.experts, ids)]
        planes = self._planes(stack)
        refuse_tangents([x, *planes, *biases])
        result: Tensor = torch.ops.fxquant.experts(x, ids, planes, biases, stack.scheme, stack.n, count, ABI)
        return result

    def _planes(self, stack: Stack) -> list[Tensor]:
        if stack.whole:
            return [as_stack(getattr(self, _flat(stack.parameter)), self.layout, stack.parameter)]
        return [getattr(self, stack.tensor(name)) for name in stack.planes]

    def matrices(self) -> Iterator[tuple[int, Projection, Scheme | None]]:
        """Every matrix of every expert, expert by expert: its expert, projection and scheme; None where it has none."""
        for e in range(self.layout.experts):
            for p in self.layout.projections:
                yield e, p, self.scheme_of(p.name, e)

    def scheme_of(self, name: str, e: int) -> Scheme | None:
        """How one matrix is stored; None for one that stays as it is.

        Raises:
            ModelError: there is no such matrix.
        """
        spelling = self._stack(name, e).scheme
        return None if spelling == PLAIN else Scheme.parse(spelling)

    def keeps_parameter(self, name: str) -> bool:
        """Whether nothing of the parameter that holds this projection is quantized, so that it is the module's own.

        Raises:
            ModelError: there is no such projection.
        """
        return self._stack(name, 0).whole

    def planes_of(self, name: str, e: int) -> dict[str, Tensor]:
        """The planes of one matrix as its scheme has them, mostly views; `weight`, where it has no scheme.

        Raises:
            ModelError: there is no such matrix.
        """
        stack = self._stack(name, e)
        specs = stack.specs(stack.part, self.dtype).items()
        held = zip(specs, self._planes(stack), strict=True)
        return {plane: stack.of_one(tensor, name, e).reshape(spec.shape) for (plane, spec), tensor in held}

    @property
    def plane_names(self) -> tuple[str, ...]:
        """Names of the buffers that hold stacked planes."""
        stored = (stack for stack in self.stacks if stack.scheme != PLAIN)
        return tuple(stack.tensor(name) for stack in stored for name in stack.planes)

    def members_problem(self) -> str | None:
        """What is wrong with a buffer that tells whose planes a stack holds, as tensors from files may have it."""
        for stack in self.stacks:
            name = stack.tensor("experts")
            found = self._buffers.get(name)
            if found is not None and found.tolist() != list(stack.experts):
                return f"its {name} are {found.tolist()[:8]}, not the experts {list(stack.experts)[:8]} of this stack"
        return None

    def load_planes(self, name: str, e: int, planes: Mapping[str, Tensor]) -> None:
        """Copy the planes of one matrix to their place, whose room is made, for the whole stack, when the first arrive.

        Args:
            name: of the projection.
            e: which expert.
            planes: as its scheme has them; `{"weight": [N, K]}` for a matrix that stays as it is.

        Raises:
            ModelError: there is no such matrix; names, shapes or dtypes are not those of the scheme.
        """
        stack = self._stack(name, e)
        specs = stack.specs(stack.part, self.dtype).items()
        found = {plane: (tuple(tensor.shape), tensor.dtype) for plane, tensor in planes.items()}
        wanted = {plane: (spec.shape, spec.dtype) for plane, spec in specs}
        if found != wanted:
            what = stack.scheme or "a matrix that stays as it is"
            raise ModelError(f"{e}.{name}: these are not planes of {what}\n  got: {found}\n  expected: {wanted}")
        with torch.no_grad():
            for plane, tensor in planes.items():
                place = stack.of_one(self._room(stack, plane, tensor.device), name, e)
                place.copy_(tensor.reshape(place.shape))

    def _room(self, stack: Stack, plane: str, device: torch.device) -> Tensor:
        if stack.whole:
            return self._planes(stack)[0]
        name = stack.tensor(plane)
        tensor: Tensor = getattr(self, name)
        if not tensor.is_meta or device.type == "meta":
            return tensor
        new = torch.empty_like(tensor, device=device)
        setattr(self, name, new if name in self._buffers else nn.Parameter(new, tensor.requires_grad))
        members = stack.tensor("experts")
        if members in self._buffers:  # of a module that was made from one on the meta device
            self._buffers[members] = torch.tensor(stack.experts, device=device)
        return new

    def weight_of(self, name: str, e: int) -> Tensor:
        """One matrix, `[N, K]` in `dtype`; a new tensor where it is stored as planes.

        Raises:
            ModelError: there is no such matrix.
        """
        scheme, planes = self.scheme_of(name, e), self.planes_of(name, e)
        if scheme is None:
            return planes["weight"].detach()
        stack = self._stack(name, e)
        return dequantize(planes, scheme, stack.part, stack.k, self.dtype)

    def _stack(self, name: str, e: int) -> Stack:
        for stack in self.stacks:
            if e in stack.experts and any(p.name == name for p in stack.projections):
                return stack
        raise ModelError(
            f"these experts have no matrix {e}.{name}\n  experts: 0 to {self.layout.experts - 1}, projections: "
            f"{', '.join(p.name for p in self.layout.projections)}"
        )

    def restore(self) -> nn.Module:
        """The module that this one replaced, of its own class, with dequantized weights; this one stays as it is."""
        module = self.restored()
        own = {_flat(name) for name in self.stack_shapes} | {name for s in self.stacks for name in s.tensors}
        module._parameters = {name: p for name, p in module._parameters.items() if name not in own}
        for name, shape in self.stack_shapes.items():
            kept = self._parameters.get(_flat(name))
            path, _, leaf = name.rpartition(".")
            parameter = kept if kept is not None else self._restored(name, shape)
            module.get_submodule(path).register_parameter(leaf, parameter)
        return module

    def _restored(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """A parameter of the replaced module; zeros where it has rows that no expert owns."""
        device = next(self._planes(stack)[0].device for stack in self.stacks if stack.parameter == name)
        tensor = torch.zeros(shape, dtype=self.dtype, device=device)
        stack = as_stack(tensor, self.layout, name)
        for e in range(self.layout.experts):
            for p in self.layout.parts(name):
                stack[e][p.rows(stack.shape[1])].copy_(self.weight_of(p.name, e))
        return nn.Parameter(tensor, self.trainable[name])

    def own_names(self) -> set[str]:
        """Names of attributes, children and buffers that are the container's own."""
        tensors = {name for stack in self.stacks for name in stack.tensors}
        return super().own_names() | {"stacks", "dtype", "trainable", "pair"} | tensors

    def extra_repr(self) -> str:
        """How many experts there are and how each kind of matrix is stored, as `print(model)` shows them."""
        stacks = (f"{len(s.experts)} x {s.name} [{s.n}, {s.k}] {s.scheme or self.dtype}" for s in self.stacks)
        return f"{self.origin.__name__}, experts={self.layout.experts}, {', '.join(stacks)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QExperts:
        planes = {id(getattr(self, name)) for name in self.plane_names}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in planes or moved.dtype == tensor.dtype else tensor.to(moved.device)

        probe = torch.empty(0, dtype=self.dtype, device=self._planes(self.stacks[0])[0].device)
        nn.Module._apply(self, keep_dtype, recurse)
        self.dtype = fn(probe).dtype
        return self


def _flat(name: str) -> str:
    """What a parameter of a child is called where the container holds it."""
    return name.replace(".", "_")
