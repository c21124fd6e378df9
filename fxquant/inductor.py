"""The private torch APIs that fxquant uses, each with the versions it was checked on. Nothing else imports them."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, ops
from torch._ops import OpOverload as OpOverload  # what aten.add.Tensor is; since torch 1.11, read in 2.11 and 2.13
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # the values of traced nodes; since 2.0, the same
from torch.utils import _pytree as pytree  # torch.export's own, which has no public name yet; 2.11 to 2.13

__all__ = [
    "FakeTensor",
    "OpOverload",
    "add_lowering",
    "as_it_is",
    "compile_cpp",
    "compile_graph",
    "constant",
    "example_size",
    "fields",
    "from_template",
    "gathered",
    "has_bfloat16_products",
    "indices",
    "is_positive",
    "is_size",
    "keeps_matrix_units",
    "likely_size",
    "lowered",
    "once_for",
    "pytree",
    "quotient",
    "realized",
    "remainder",
    "row_sums",
    "searches_kernels",
    "side_by_side",
    "sorted_by_remainder",
    "triton_template",
]

T = TypeVar("T")


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """What `torch.compile` does by default with a graph: AOTAutograd, then Inductor.

    `compile_fx(gm, inputs, config_patches=...)` and `list_mode_options(mode)`: read in torch 2.11, 2.13.
    """
    # Imported here: Inductor takes seconds to import, and whoever compiles nothing needs none of it.
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode not in (None, "default") else {}), **options}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return cast(Callable[..., Any], compiled)


def compile_cpp(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """A library built from one C++ file, with Inductor's compiler, flags and cache, where it lies for later processes.

    `CppCodeCache.load(source, extra_flags=...)`: read in torch 2.11, 2.13. It raises whatever a compiler can fail with.
    """
    from torch._inductor.codecache import CppCodeCache

    built: Any = CppCodeCache.load(source, extra_flags=tuple(flags))
    return cast(ctypes.CDLL, built)


def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16: tiles of it (AMX) or pairs (AVX512-BF16).

    `torch.cpu._is_amx_tile_supported` and `_is_avx512_bf16_supported`: read in torch 2.11, 2.13.
    """
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def keeps_matrix_units() -> bool:
    """Whether the CPU has matrix units (AMX), which the system, a sandbox or an old kernel, denies us.

    `torch.cpu._is_amx_tile_supported` and `_init_amx`, which asks for them: read in torch 2.11, 2.13.
    """
    return bool(torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx())


def add_lowering(op: OpOverload, lower: Callable[..., Any]) -> None:
    """Let Inductor lower `op` by `lower`, from the moment on at which Inductor itself is imported; before: nothing.

    `register_lowering(op, type_promotion_kind=None)`, which wraps `lower`, and the dictionary `lowerings`, where
    Inductor also puts the fallback of an op that it has met without a lowering: read in torch 2.11, 2.13.
    """
    # Inductor takes seconds to import. It is there before it traces, and whoever compiles nothing needs none of it.
    module: Any = sys.modules.get("torch._inductor.lowering")
    if module is None or not hasattr(module, "register_lowering"):
        return
    if getattr(module.lowerings.get(op), "__wrapped__", None) is not lower:
        module.register_lowering(op, type_promotion_kind=None)(lower)


def lowered(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What Inductor makes of a call of `op` on values of its own: another such value. In torch 2.11, 2.13 alike."""
    from torch._inductor.lowering import lowerings

    return lowerings[op](*args, **kwargs)


def as_it_is(op: OpOverload, *args: Any) -> Any:
    """A call of `op` from the generated code, as of an op that has no lowering: read in torch 2.11, 2.13."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def constant(tensor: Tensor) -> Any:
    """A tensor that is known when a graph is compiled, as a value.

    `add_tensor_constant`, which gives values to the module of the outermost graph alone; a graph inside of another one,
    its `parent`, asks its own `constants` for them: read in torch 2.11, 2.13.
    """
    from torch._inductor.virtualized import V

    root: Any = V.graph
    while hasattr(root, "parent"):
        root = root.parent
    value = root.add_tensor_constant(tensor)
    V.graph.constants.setdefault(value.get_name(), tensor)
    return value


def gathered(value: Any, size: Sequence[int], place: Callable[..., Sequence[Any]]) -> Any:
    """`result[i, j, ...] = value[place(i, j, ...)]`, computed where it is read. Divisions are `quotient`'s.

    `Pointwise.create(device=, dtype=, inner_fn=, ranges=)` and `make_loader`: read in torch 2.11, 2.13.
    """
    from torch._inductor.ir import Pointwise

    load = value.make_loader()

    def inner(index: Sequence[Any]) -> Any:
        return load(place(*index))

    return Pointwise.create(device=value.get_device(), dtype=value.get_dtype(), inner_fn=inner, ranges=list(size))


def fields(value: Any, bits: int, size: Sequence[int], place: Callable[..., Sequence[Any]]) -> Any:
    """As `gathered`, of unsigned fields of 1 to 32 bits that rows of bytes hold as a stream: int32, if wider int64.

    `place` gives a row and the number of a field in it. Functions of `ops` in loops: read in torch 2.11, 2.13.
    """
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import ops as loop
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    load = value.make_loader()
    spanned = max((start + bits + 7) // 8 for start in range(0, 8, math.gcd(bits, 8)))
    kind = torch.int32 if 8 * spanned < 32 else torch.int64

    def inner(index: Sequence[Any]) -> Any:
        row, number = place(*index)
        first, last = number * bits, number * bits + bits - 1
        found = loop.to_dtype(load([row, FloorDiv(first, 8)]), kind)
        for i in range(1, spanned):
            # A field that ends earlier: its last byte again, above what is looked at.
            byte = FloorDiv(last, 8) if i == spanned - 1 else FloorDiv(first, 8) + i
            above = loop.to_dtype(load([row, byte]), kind)
            found = loop.bitwise_or(found, loop.bitwise_left_shift(above, loop.constant(8 * i, kind)))
        shift = loop.index_expr(ModularIndexing(first, 1, 8), kind)
        return loop.bitwise_and(loop.bitwise_right_shift(found, shift), loop.constant((1 << bits) - 1, kind))

    return Pointwise.create(device=value.get_device(), dtype=kind, inner_fn=inner, ranges=list(size))


def row_sums(value: Any) -> Any:
    """`value.sum([1, 2, ...])`, computed by one kernel, a row at a time by neighbouring threads.

    Inductor would take reads with gaps, as of three bytes for four codes, for reads of columns, and sum in two kernels.
    `Reduction.create`, hints, `config.split_reductions`: read in torch 2.11, 2.13.
    """
    from torch._inductor import config
    from torch._inductor.ir import Reduction
    from torch._inductor.runtime.hints import ReductionHint

    load, (rows, *rest) = value.make_loader(), value.get_size()

    def inner(index: Sequence[Any], reduced: Sequence[Any]) -> Any:
        return load([*index, *reduced])

    with config.patch(split_reductions=False):
        result = Reduction.create(
            device=value.get_device(),
            dst_dtype=value.get_dtype(),
            src_dtype=value.get_dtype(),
            inner_fn=inner,
            ranges=[rows],
            reduction_ranges=rest,
            reduction_type="sum",
            reduction_hint=ReductionHint.INNER,
            input_node=value,
        )
    result.realize()
    return result


def indices(device: torch.device, size: Sequence[int], place: Callable[..., Any]) -> Any:
    """`result[i, j, ...] = place(i, j, ...)`, int64, computed where it is read. Read in torch 2.11, 2.13."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import ops as loop

    def inner(index: Sequence[Any]) -> Any:
        return loop.index_expr(place(*index), torch.int64)

    return Pointwise.create(device=device, dtype=torch.int64, inner_fn=inner, ranges=list(size))


def quotient(index: Any, size: int) -> Any:
    """The whole part of an index divided by a size: `FloorDiv`, read in torch 2.11, 2.13."""
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(index, size)


def remainder(index: Any, size: int) -> Any:
    """The remainder of an index divided by a size: `ModularIndexing`, read in torch 2.11, 2.13."""
    from torch.utils._sympy.functions import ModularIndexing

    return ModularIndexing(index, 1, size)


def side_by_side(values: Sequence[Any]) -> Any:
    """The values joined along their last dimension.

    The lowering of `aten.cat` and `set_current_node`: read in torch 2.11, 2.13. In 2.11 the current node has to be an
    `aten.cat`, whose inputs are asked for their memory format: a list of no inputs is the answer.
    """
    from torch._inductor.virtualized import V

    users = V.graph.current_node.users
    with V.graph.set_current_node(cast(Any, SimpleNamespace(args=([],), users=users))):
        return lowered(ops.aten.cat, list(values), -1)


def realized(value: Any) -> Any:
    """The value as a contiguous buffer in memory: read in torch 2.11, 2.13."""
    from torch._inductor.ir import ExternKernel

    return ExternKernel.require_contiguous(ExternKernel.realize_input(value))


def sorted_by_remainder(value: Any, size: int, count: int) -> Any:
    """A vector in memory, first its elements 0, count, 2 * count, ..., then 1, count + 1, ..., and so on.

    What computes the value can store it so: the store has the new place, the loop stays the value's own. `Scatter`,
    `ComputedBuffer(name=, layout=, data=)`, the two registers of a graph, sympy's functions: read in torch 2.11, 2.13.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    def place(index: Sequence[Any]) -> Any:
        return [ModularIndexing(index[0], 1, count) * (size // count) + FloorDiv(index[0], count)]

    device, kind, load = value.get_device(), value.get_dtype(), value.make_loader()
    data = ir.Scatter(device=device, dtype=kind, inner_fn=load, ranges=[cast(Any, size)], output_indexer=place)
    layout = ir.FixedLayout(device, kind, [cast(Any, size)])
    buffer: Any = ir.ComputedBuffer(name=None, layout=layout, data=data)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return ir.TensorBox.create(buffer)


def once_for(value: Any, what: object, make: Callable[[], Any]) -> Any:
    """What `make` gives for the value of a node, made once in a graph however many nodes read that one as `what`.

    A node's value is a box around what is there, and `V.graph` lives as long as one graph: read in torch 2.11, 2.13.
    """
    from torch._inductor.virtualized import V

    made: dict[Any, Any] = V.graph.__dict__.setdefault("_made_by_fxquant", {})
    key = id(value.data), what
    if key not in made:
        made[key] = value.data, make()  # the value as well, so that its id stays its own
    return made[key][1]


def is_size(size: Any, number: int) -> bool:
    """Whether a size of Inductor's, maybe a symbol, is this number for certain: read in torch 2.11, 2.13."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_equals(size, number))


def is_positive(size: Any) -> bool:
    """Whether a size of Inductor's, maybe a symbol, is more than 0 for certain: read in torch 2.11, 2.13."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_gt(size, 0))


def example_size(size: int | torch.SymInt) -> int | None:
    """What a size in a captured graph, maybe a symbol, was with the example inputs; None where it depends on data.

    `SymNode.hint`: read in torch 2.11, 2.13.
    """
    return size if isinstance(size, int) else cast("int | None", size.node.hint)


def likely_size(size: Any, unknown: int) -> int:
    """What a size of Inductor's, maybe a symbol, was when the graph was traced; `unknown` where nothing tells.

    `size_hint` in torch 2.11, `optimization_hint` in 2.13.
    """
    from torch._inductor.virtualized import V

    sizes: Any = V.graph.sizevars
    hint = sizes.optimization_hint if hasattr(sizes, "optimization_hint") else sizes.size_hint
    return int(hint(size, fallback=unknown))


def searches_kernels() -> bool:
    """Whether the user asked for kernels to be chosen by measurement: read in torch 2.11, 2.13."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def triton_template(name: str, source: str) -> Any:
    """A kernel into which Inductor fuses what follows it. One per name and process: Inductor refuses a second one.

    `source` is Triton in Inductor's Jinja; a program computes BLOCK_M x BLOCK_N of a matrix; of a stack of
    them, it is the matrix of the program's second index.
    `TritonTemplate(name=, grid=, source=)` and `SymbolicGridFn`: read in torch 2.11, 2.13.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    @SymbolicGridFn
    def grid(*sizes: Any, cdiv: Callable[..., Any]) -> tuple[Any, Any, int]:
        *outer, m, n, meta = sizes
        return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), math.prod(outer), 1

    return TritonTemplate(name=name, grid=grid, source=source)


def from_template(
    template: Any, inputs: Sequence[Any], size: Sequence[Any], dtype: torch.dtype, configs: Sequence[Mapping[str, Any]]
) -> Any | None:
    """A matrix of this size and dtype, or a stack of them, by the best of the configs; None where there is none.

    With one config nothing is measured. `maybe_append_choice(choices, input_nodes=, layout=, ...)` and
    `autotune_select_algorithm`, which returns a pair from torch 2.12 on: read in 2.11, 2.13.
    """
    from torch._inductor.ir import FixedLayout
    from torch._inductor.select_algorithm import autotune_select_algorithm

    layout = FixedLayout(inputs[0].get_device(), dtype, list(size))
    choices: list[Any] = []
    for config in configs:
        template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **config)
    if not choices:
        return None
    found = autotune_select_algorithm(template.name, choices, list(inputs), layout)
    return found[0] if isinstance(found, tuple) else found
