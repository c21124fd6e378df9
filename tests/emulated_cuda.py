"""Inductor's code generation for a CUDA device that is not there: lowering, scheduling and Triton source are real.

What it shows: which kernels Inductor writes for a graph, and, by Triton's compiler, what becomes of them. What it does
not show: times. Wherever Inductor would measure, it is told that the first template is best.
The patches are for a whole process and stay: call this in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)


class Properties(SimpleNamespace):
    type, name, major, minor = "cuda", "emulated", 9, 0
    multi_processor_count, max_threads_per_multi_processor, max_threads_per_block = 132, 2048, 1024
    regs_per_multiprocessor, warp_size, total_memory, L2_cache_size = 65536, 32, 1 << 37, 50 << 20
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448
    shared_memory_per_multiprocessor, gcnArchName, clock_rate, memory_clock_rate = 233472, "", 1980000, 3201000
    memory_bus_width, uuid, pci_bus_id = 6144, "emulated", 0
    is_integrated = is_multi_gpu_board = 0


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class _Device(contextlib.nullcontext[None]):
    def __init__(self, *args: Any) -> None:
        super().__init__()


def emulate(folder: str) -> None:
    """Make torch and Triton believe in one device of compute capability 9.0; caches go to `folder`."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as config
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as has

    properties = Properties()
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = _returning(True), _returning(1), _returning(0)
    cuda.get_device_properties, cuda.get_device_capability = _returning(properties), _returning((9, 0))
    cuda.get_device_name = _returning(properties.name)
    cuda._lazy_init = cuda.synchronize = _returning(None)
    cuda.device = cuda._DeviceGuard = _Device
    torch.accelerator.is_available = _returning(False)  # Dynamo would ask for its stream
    cuda.set_device = cuda.set_rng_state = _returning(None)
    cuda.get_rng_state = _returning(torch.zeros(16, dtype=torch.uint8))
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._C._cuda_getCurrentRawStream = _returning(0)
    for name in ("setDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", _returning(0))
    fake_tensor.init_gpu_context = _returning(None)
    has.has_triton = _returning(True)
    interfaces.init_device_reg()
    found: Any = interfaces.CudaInterface
    interfaces.register_interface_for_device("cuda", found)
    found.is_available = found.is_triton_capable = staticmethod(_returning(True))
    found.get_device_properties = staticmethod(_returning(properties))
    found.raise_if_triton_unavailable = staticmethod(_returning(None))
    found.get_compute_capability = staticmethod(_returning(90))
    found.Worker.get_device_properties = staticmethod(_returning(properties))
    found.Worker.current_device = staticmethod(_returning(0))
    config.compile_threads = 1
    _set_driver()
    _measure_nothing()


def _set_driver() -> None:
    import torch._inductor.runtime.triton_helpers as helpers
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=_returning(GPUTarget("cuda", 90, 32)),
        get_current_device=_returning(0),
        get_current_stream=_returning(0),
        get_active_torch_device=_returning(DEVICE),
        get_device_interface=_returning(torch.cuda),
        is_active=_returning(True),
        map_python_to_cpp_type=_returning("int"),
        utils=SimpleNamespace(
            get_device_properties=_returning(
                {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
            )
        ),
    )
    triton.runtime.driver.set_active(driver)
    helpers.set_driver_to_gpu = _returning(None)


def _measure_nothing() -> None:
    """No kernel can run: of several, the first template counts as the fastest."""
    import torch._inductor.graph
    import torch._inductor.select_algorithm as select

    def times(self: Any, name: str, inputs: Any, layout: Any, fns: Any, choices: Sequence[Any], *rest: Any, **kw: Any):
        return {c: i + (0 if isinstance(c, select.TritonTemplateCaller) else 1000) for i, c in enumerate(choices)}

    def look_up(self: Any, choices: Any, op: Any, inputs: Any, benchmark: Any, *rest: Any, **kw: Any):
        return benchmark(choices) if benchmark else {}

    graph: Any = torch._inductor.graph
    graph.is_same_tensor = lambda a, b: a is b  # fake tensors have no memory to compare
    cache: Any = select.AlgorithmSelectorCache
    cache.autotune, cache.lookup = times, look_up
    cache.make_precompile_fn = lambda self, *a, **k: dict


@dataclass(frozen=True)
class Generated:
    """The module that Inductor would have run."""

    source: str
    constants: dict[str, Tensor]

    @property
    def kernels(self) -> dict[str, str]:
        """Source of every Triton kernel by name."""
        return dict(re.findall(r"async_compile\.triton\('([^']+)', '''(.*?)''', device_str", self.source, re.S))

    @property
    def wrapper(self) -> str:
        """The module without its kernels and comments."""
        text = re.sub(r"async_compile\.triton\('[^']+', '''.*?'''", "", self.source, flags=re.S)
        return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))

    @property
    def launches(self) -> list[str]:
        """Names of the Triton kernels in the order in which they run."""
        return re.findall(r"^\s+(\w+)\.run\(", self.wrapper, re.M)

    @property
    def externs(self) -> list[str]:
        """Calls of libraries and of custom ops."""
        return re.findall(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)(?=\()", self.wrapper)


def reads_weights(kernel: str) -> bool:
    """Whether a kernel's source has arguments of bytes, which codes are."""
    return re.search(r"'\*[ui]8'", kernel) is not None


def generate(
    fn: Callable[..., Any], inputs: Sequence[Tensor], config: dict[str, Any] | None = None, symbolic: bool = False
) -> Generated:
    """What Inductor writes for `fn(*inputs)` if the inputs were on a GPU.

    Args:
        fn: without autograd, without effects.
        inputs: CPU tensors; shapes, strides and dtypes count. They are read from nowhere.
        config: of Inductor.
        symbolic: whether the first dimension of the first input is a symbol, and all that are as long.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = []
    for tensor in inputs:
        same = symbolic and tensor.ndim and tensor.shape[0] == inputs[0].shape[0]
        kinds = [DimDynamic.DUCK if same and dim == 0 else DimDynamic.STATIC for dim in range(tensor.ndim)]
        fakes.append(_on_the_gpu(mode, mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(kinds))))
    with torch.no_grad(), inductor_config.patch(config or {}):
        with mode:
            gm = make_fx(fn, select_decomp_table(), tracing_mode="symbolic")(*fakes)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            return _lowered(gm, fakes, mode)


def _on_the_gpu(mode: Any, tensor: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def _lowered(gm: Any, inputs: Sequence[Tensor], mode: Any) -> Generated:
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    constants = _Constants(mode)
    with V.set_fake_mode(mode):
        view_to_reshape(gm)
        post_grad_passes(gm, is_inference=True)
        graph = GraphLowering(gm, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()), constants:
            graph.run(*inputs)
            code, _ = graph.codegen()
    real = {name: next(r for fake, r in constants.made if fake is value) for name, value in graph.constants.items()}
    return Generated(str(getattr(code, "value", code)), real)


def compiled(model: torch.nn.Module, x: Tensor, backend: Callable[..., Any]) -> Generated:
    """What `torch.compile(model, backend=backend)(x)` has Inductor write, if model and x were on a GPU.

    Dynamo traces the model where it is, on the meta device, say. In its graph, every tensor is then moved to the GPU
    that is not there, and the backend gets it. Of its passes, Inductor's own patterns of attention are left out, which
    it prepares on a GPU.
    """
    import torch._inductor.compile_fx as inductor
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._guards import TracingContext
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils._python_dispatch import _disable_current_modes

    found: list[Generated] = []

    def nothing(*args: Any) -> list[Tensor]:
        return [x]

    def inner(gm: Any, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        inductor.record_original_output_strides(gm)
        with _disable_current_modes():  # as Inductor's own compilation does
            found.append(_lowered(gm, inputs, TracingContext.get().fake_mode))
        return nothing

    def emulated(gm: Any, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        mode = TracingContext.get().fake_mode
        fakes = [_on_the_gpu(mode, tensor) for tensor in inputs]
        with mode:
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
        for node in gm.graph.nodes:
            node.meta["example_value"] = node.meta.pop("val", None)
        backend(gm, fakes)
        return nothing

    patched = mock.patch.object(inductor, "compile_fx", functools.partial(inductor.compile_fx, inner_compile=inner))
    torch._dynamo.reset()  # or another batch size would be a symbol
    with torch.no_grad(), patched, mock.patch.object(joint_graph, "lazy_init", _returning(None)):
        torch.compile(model, backend=emulated, fullgraph=True)(x)
    (generated,) = found
    return generated


class _Constants(torch.overrides.TorchFunctionMode):
    """A constant that a lowering makes on the device is made on the CPU, and stands for one that is there."""

    made: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        real = func(*args, **{**kwargs, "device": "cpu"})
        with self.mode:
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=DEVICE)
        self.made.append((fake, real))
        return fake
