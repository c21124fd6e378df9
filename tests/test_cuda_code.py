"""The code that Inductor writes for fxquant::linear on CUDA: what is fused, what it compiles to, what it computes.

No GPU is needed, and none is used: a device is made believe, Triton's compiler gives machine code for GPUs that are not
there, and Triton's interpreter runs the kernels on a CPU. Times are nowhere claimed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Inductor writes Triton for CUDA")
numpy = pytest.importorskip("numpy")
WORKER = Path(__file__).with_name("cuda_worker.py")

FUSED = {
    # One row: gate, up and the activation in one kernel; q, k and v in one. Another one brings x into the order in
    # which it is read fast, where nothing computes x.
    "gated 1 int4-g128": (2, 1),
    "gated 1 nf4": (2, 1),
    "attention 1 int4-g128": (2, 1),
    "siblings 1 int4-g128-asym": (2, 1),
    "epilogue 1 mxfp4": (2, 1),
    "plain 1 int8": (1, 1),
    "wide 1 int4-g128": (2, 1),
    # The norm before gate and up, and what they give, are stored in that order as they are computed.
    "block 1 int4-g128": (3, 2),
    # Some rows: one template for each linear, with bias and activation in it.
    "epilogue 64 int4-g128": (1, 1),
    "epilogue 16 nf4": (1, 1),
    "plain 8 int4-g64-asym symbolic": (1, 1),
    "gated 64 int4-g128": (2, 2),
    "block 32 int4-g128": (5, 3),
    "plain 2 q4_1": (1, 1),
    "plain 128 int8": (1, 1),
    # A weight of few rows: its columns are split, and what adds the parts up has bias and activation in it.
    "narrow 16 int4-g128": (2, 1),
    "narrow 64 int4-g64-asym symbolic": (2, 1),
    # Formats of several levels, of other widths, of blocks of several rows: one row, then a few.
    "plain 1 q4_k": (2, 1),
    "plain 1 q6_k": (2, 1),
    "plain 1 nvfp4": (2, 1),
    "plain 1 nf4-dq": (2, 1),
    "gated 1 int3-g64": (2, 1),
    "plain 1 fp8": (1, 1),
    "gated 1 fp8-b128x128": (1, 1),
    "plain 1 int4-b8x128": (2, 1),
    "plain 1 iq2_xs": (1, 1),
    "plain 1 tq1_0": (1, 1),
    "plain 1 int4-g64-perm": (2, 1),
    "epilogue 16 fp8": (1, 1),
    "epilogue 16 int2-g64": (1, 1),
    # Activations in codes: these first, by what computes x, then one kernel.
    "gated 1 int4-g128+int8": (2, 1),
    "plain 1 fp8+fp8": (2, 1),
    "plain 8 int8+int8": (2, 1),
    "siblings 16 int4-g128+int8": (5, 3),
    "block 1 int8+int8": (4, 2),
    "shared 1 int4-g128+int8": (3, 2),
    "shared 8 int4-g128+int8": (3, 2),
    "epilogue 8 fp8+fp8 symbolic": (2, 1),
    # Scales and biases are computed first, for one kernel that reads them.
    "plain 8 nf4-dq": (2, 2),
    "plain 8 q4_k": (3, 3),
    "plain 8 fp8-b128x128": (2, 1),
    # Experts of a few tokens: gate, up and their product in one kernel, as is down.
    "experts 1 q4_k": (2, 1),
    "experts 1 fp8-b128x128": (1, 1),
    "experts 4 nf4": (2, 1),
    "experts 4 fp8-b128x128+fp8-g128": (2, 1),
    "gated_experts 1 int4-g128": (4, 2),
    "gated_experts 4 int4-g64-asym": (4, 2),
}
"""Graph: kernels, and how many of them read a weight; nothing else is called."""
DECODED = {"plain 512 int4-g128": 2, "plain 512 nf4": 2, "wide 8 int4-g128": 1, "plain 512 uint8-g64": 2}
DECODED |= {"plain 8 int3-g64": 2, "plain 8 q6_k": 2, "plain 512 nf4-dq": 2, "plain 8 iq2_xs": 2, "plain 8 tq1_0": 2}
"""Graph: kernels beside one product of the library's."""
ROUTES = {
    (1, "int4-g128"): (6, 4),
    (64, "int4-g128"): (9, 7),
    (1, "nf4-dq"): (6, 4),
    (1, "q4_k"): (6, 4),
    (64, "fp8"): (9, 7),
    # Where neither norm nor activation stands before codes, one kernel more makes them.
    (1, "int8+int8"): (8, 4),
    (64, "int8+int8"): (11, 7),
    (64, "fp8+fp8"): (11, 7),
}
"""Rows and scheme: kernels of a decoder's layer, and how many of them read a weight. Two are norms. Of one row, seven
linears are q with k and v, o, gate with up, and down, with all that stands between."""
SORTED = {
    # Rows in the order of their experts, the product, and tokens in their own order with the activation.
    "experts 64 int4-g128": (3, 1),
    "experts 300 nf4": (3, 1),
    "experts 50 int4-g128 symbolic": (3, 1),
    "experts 64 fp8-b128x128": (4, 1),
    "experts 64 int4-g128+int8": (5, 1),
}
"""The same of many tokens for experts, whose order one call of the library finds."""
AS_IT_IS = ["plain 300 int8+int8", "plain 300 fp8+fp8", "plain 8 llm-int8", "plain 8 nf4+int8"]
AS_IT_IS += ["experts 1 tq1_0", "experts 64 int3-g64", "experts 4 int8+int8-static", "gated_experts 64 int4-g128"]
COMPILED = ["gated 1 int4-g128", "gated 1 nf4", "epilogue 16 int4-g128", "epilogue 64 int4-g128", "narrow 16 int4-g128"]
COMPILED += [
    "plain 1 q4_k",
    "gated 1 fp8",
    "epilogue 16 fp8",
    "plain 64 nf4",
    "plain 32 int4-g32-asym",
    "experts 64 int4-g128",
    "plain 64 int8",
]
BLOCKS = "torch.ops.fxquant.expert_blocks.default"
WIDE_LOADS = {"plain": 10, "gated": 12}
"""So many loads of sixteen bytes does a thread make: 2 of codes, for gate and up 4, and 8 of x."""
CAPABILITIES = [80, 90, 100]
MOST_SHARED = 99 << 10
"""Bytes of shared memory that a block may have on every GPU from compute capability 8.0 on."""

VECTORS = ["iq1_s", "iq2_xxs", "iq2_xs", "iq3_s", "vq8.8x8", "vq16.12x8", "vq10x4r3c2", "vq12x8-colscale-colbias"]
INTEGERS = ["int4-g128", "int4-g64-asym", "uint4-g32", "int4-g32-fzero", "q4_1", "int8", "int8-g32-asym", "uint8-g16"]
FLOATS = ["fp8", "fp8e5m2", "mxfp8", "fp8-b16x128"]
LEVELS = ["nf4-dq", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "int4-b8x128-asym", "nf4-g64-e4m3*fp32"]
WIDTHS = [
    "int2-g64",
    "int3-g64-asym",
    "int5-g32-fzero",
    "int6-g64",
    "uint3-g32-bias",
    "q1_0",
    "q2_0",
    "mxfp6",
    "bitnet",
]
ACTIVATIONS = ["int8+int8", "int4-g64+int8", "int8-g64-asym+int8-static", "fp8+fp8", "fp8-b16x128+fp8-g128"]
ACTIVATIONS += ["int4-b8x128-asym+int8", "int2-flat64-asym+int8", "int4-g64-perm+int8", "mxfp4+int8", "fp8+fp8-static"]
IRREGULAR = ["trit-g64", "tq1_0", "int4-g64-perm", "int8-tensor", "int4-flat64-asym", "int8-b8x64-bias"]
TABLES = ["nf4", "fp4", "mxfp4", "iq4_nl", "table(-8,-5,-3,-2,-1.5,-1,-0.5,-0.25,0,0.25,0.5,1,1.5,2,4,8)-g32-fp32"]


def _numbers() -> list[list[Any]]:
    """Scheme, m, rows, k, dtype, bias, searched."""
    found: list[list[Any]] = []
    for i, spelling in enumerate(INTEGERS + TABLES):
        half, other = ("bfloat16", "float16") if i % 2 else ("float16", "bfloat16")
        found.append([spelling, 1, [50], 256, half, True, False])
        found.append([spelling, 5, [50], 384, half, True, False])
        found.append([spelling, 33, [33], 128, other, False, False])
    for i, spelling in enumerate(FLOATS + LEVELS + WIDTHS + IRREGULAR):
        half = "bfloat16" if i % 2 else "float16"
        found.append([spelling, 1, [34], 256, half, True, False])
        found.append([spelling, 5, [18, 16], 256, half, i % 3 == 0, False])
    for spelling in VECTORS:
        found.append([spelling, 1, [24], 512, "bfloat16", False, False])
        found.append([spelling, 3, [24], 512, "float16", False, False])
    found += [
        *([spelling, 1, [34], 256, "bfloat16", True, False] for spelling in ACTIVATIONS),
        *([spelling, 5, [18, 16], 256, "float16", i % 2 == 0, False] for i, spelling in enumerate(ACTIVATIONS)),
        ["int4-g64+int8", 3, [24], 2048, "bfloat16", True, False],  # columns in parts
        # blocks that straddle rows, blocks at the end of a row that are smaller, fields that end within a byte
        ["nf4", 1, [19], 96, "bfloat16", False, False],
        ["nf4-dq", 3, [19], 200, "bfloat16", False, False],
        ["int4-flat64-asym", 1, [19], 100, "float32", True, False],
        ["fp8-b16x128", 3, [19], 200, "bfloat16", False, False],
        ["int3-row", 1, [19], 50, "float32", False, False],
        ["int3-row", 3, [19], 50, "bfloat16", False, False],
        ["int4-g128", 1, [7], 128, "float32", True, False],  # one group is all of K
        ["nf4", 1, [1], 64, "float32", False, False],
        ["int4-g96-asym", 3, [18], 96, "bfloat16", False, False],  # a group that is no power of two
        ["uint4-g16", 2, [16], 48, "float16", True, False],  # an odd number of groups
        ["int8", 2, [40], 48, "bfloat16", False, False],
        ["int4-g32", 1, [48, 16, 16], 96, "bfloat16", True, False],
        ["int4-g32", 17, [48, 16, 16], 96, "bfloat16", True, False],
        ["int4-g128-asym", 200, [20], 256, "bfloat16", True, False],  # decoded as a whole
        ["mxfp4", 200, [20], 64, "float16", False, False],
        ["int4-g128", 130, [140], 128, "bfloat16", True, False],  # more than one tile each way
        ["int4-g64", 40, [70], 128, "bfloat16", False, True],
        ["int4-g128", 4, [24], 20 * 128, "float16", False, False],
        # columns in four parts, with a bias and without
        ["int4-g128", 3, [24], 2048, "bfloat16", True, False],
        ["nf4", 17, [40, 33], 1024, "float16", False, False],
        # steps within one group, of codes that are scaled one by one
        ["uint4-g128-bias", 5, [24], 256, "bfloat16", True, False],
        ["int4-g128-fzero", 5, [24], 256, "float16", False, False],
        ["table(-8,-5,-3,-2,-1.5,-1,-0.5,-0.3,0,0.3,0.5,1,1.5,2,4,8)-g128", 5, [24], 256, "bfloat16", True, False],
        ["int8-g2", 3, [20], 64, "bfloat16", False, False],
        ["int4-g24", 3, [20], 72, "bfloat16", False, False],  # no step that tensor cores take: decoded as a whole
    ]
    return found


NUMBERS = _numbers()
EXPERTS = [
    ["int4-g128", 3, 20, 256, "bfloat16", False],
    ["int4-g64-asym", 1, 18, 192, "float32", False],
    ["nf4", 2, 33, 64, "float16", True],
    ["int8", 3, 24, 48, "bfloat16", True],
    ["q4_1", 1, 7, 96, "float32", True],
    ["q4_k", 2, 9, 256, "bfloat16", False],
    ["fp8-b16x128", 2, 20, 256, "bfloat16", True],
    # of many tokens, in blocks of 16, 32 and 64 rows
    ["int4-g128", 40, 20, 256, "bfloat16", False],
    ["int4-g64-asym", 50, 40, 128, "float16", True],
    ["nf4-dq", 70, 33, 64, "bfloat16", False],
    ["q4_1", 150, 24, 96, "float16", False],
    ["fp8-b16x128", 40, 20, 256, "bfloat16", True],
    # with activations in codes
    ["int8+int8", 2, 20, 256, "bfloat16", False],
    ["fp8-b16x128+fp8-g128", 2, 20, 256, "float16", True],
    ["fp8-b16x128+fp8-g128", 50, 20, 256, "bfloat16", False],
    ["int4-g64+int8", 40, 24, 128, "float32", True],
]
"""Scheme, tokens, n, k, dtype, whether every slot has an input of its own."""
GATED = [["int4-g32", 3, 64, 96], ["nf4", 1, 64, 128], ["int8", 2, 24, 40]]
"""Scheme, tokens, features between the products, k."""
NAMES = [*FUSED, *DECODED, *SORTED, *AS_IT_IS]
ROUTED = [[backend, m, scheme] for backend in ("fxquant", "inductor") for m, scheme in ROUTES]


def _ask(requests: dict[str, list[Any]], **environment: str) -> dict[str, list[Any]]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    path = [str(WORKER.parent), str(WORKER.parents[1]), *filter(None, [variables.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    run = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
        env=variables,
    )
    # An exception would not be cached, and every test would start the process again.
    failed = {kind: [run.stderr[-6000:]] * len(wanted) for kind, wanted in requests.items()}
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else failed


@functools.cache
def generated() -> dict[str, list[Any]]:
    requests = {
        "fusion": NAMES,
        "routes": ROUTED,
        "machine": [[name, CAPABILITIES] for name in COMPILED],
    }
    return _ask(requests, TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")


@functools.cache
def interpreted() -> dict[str, list[Any]]:
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not run with NumPy 2.4")
    requests = {"numbers": NUMBERS, "expert_numbers": EXPERTS, "gated_numbers": GATED}
    return _ask(requests, TRITON_INTERPRET="1")


def _checked(answer: Any) -> Any:
    assert not isinstance(answer, str), answer
    return answer


def _fused(name: str) -> Any:
    return _checked(generated()["fusion"][NAMES.index(name)])


@pytest.mark.parametrize("name", FUSED)
def test_kernels_of_our_own_and_nothing_else(name: str) -> None:
    found = _fused(name)
    assert (len(found["launches"]), len(found["weights"])) == FUSED[name]
    assert found["externs"] == []


@pytest.mark.parametrize(("m", "scheme"), ROUTES)
@pytest.mark.parametrize("backend", ["fxquant", "inductor"])
def test_a_quantized_layer_that_torch_compiles(backend: str, m: int, scheme: str) -> None:
    found = _checked(generated()["routes"][ROUTED.index([backend, m, scheme])])
    assert (len(found["launches"]), len(found["weights"])) == ROUTES[m, scheme]
    assert found["externs"] == []


@pytest.mark.parametrize("name", DECODED)
def test_many_rows_go_to_the_library(name: str) -> None:
    found = _fused(name)
    assert (len(found["launches"]), found["externs"]) == (DECODED[name], ["extern_kernels.mm"])


@pytest.mark.parametrize("name", SORTED)
def test_many_tokens_are_sorted_by_expert(name: str) -> None:
    found = _fused(name)
    assert (len(found["launches"]), len(found["weights"])) == SORTED[name]
    assert found["externs"] == [BLOCKS]


@pytest.mark.parametrize("name", AS_IT_IS)
def test_what_has_no_kernel_stays_the_op(name: str) -> None:
    kind = name.split()[0]
    op = kind if kind.endswith("experts") else "linear"
    assert _fused(name)["externs"] == [f"torch.ops.fxquant.{op}.default"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name: str, capability: int) -> None:
    kernels = [
        kernel
        for kernel in _checked(generated()["machine"][COMPILED.index(name)])
        if kernel["capability"] == capability
    ]
    assert kernels
    for kernel in kernels:
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= MOST_SHARED
        if " 1 " in name:
            assert kernel["16-byte loads"] >= WIDE_LOADS[name.split()[0]]
        else:
            assert kernel["tensor cores"] > 0
            assert kernel["16-byte copies"] > 0


@pytest.mark.parametrize("i", range(len(EXPERTS)), ids=["-".join(map(str, request)) for request in EXPERTS])
def test_numbers_of_experts(i: int) -> None:
    found = _checked(interpreted()["expert_numbers"][i])
    assert found["error"] <= 1
    assert (found["absent"], found["externs"]) == (0, [BLOCKS] if EXPERTS[i][1] > 32 else [])


@pytest.mark.parametrize("i", range(len(GATED)), ids=["-".join(map(str, request)) for request in GATED])
def test_numbers_of_gated_experts(i: int) -> None:
    found = _checked(interpreted()["gated_numbers"][i])
    assert found["error"] <= 1e-5
    assert found["externs"] == []


@pytest.mark.parametrize("i", range(len(NUMBERS)), ids=["-".join(map(str, request)) for request in NUMBERS])
def test_numbers(i: int) -> None:
    found = _checked(interpreted()["numbers"][i])
    assert found["error"] <= 1
    assert not [extern for extern in found["externs"] if extern.startswith("torch.ops.fxquant.")]
