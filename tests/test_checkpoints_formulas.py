"""Formats whose libraries need a GPU, or are not there: packed here in plain words, and decoded in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant import checkpoints
from fxquant.checkpoints import Planes
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError
from fxquant.scheme import Activation

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def stream(codes: np.ndarray, bits: int, word: int = 32) -> Tensor:
    """Rows of codes as words, each row one long number, the first code lowest."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        size = -(-len(row) * bits // word)
        rows.append([number >> (word * i) & ((1 << word) - 1) for i in range(size)])
    kinds = {8: (np.uint8, np.uint8), 16: (np.uint16, np.int16), 32: (np.uint32, np.int32)}
    return torch.from_numpy(np.array(rows, kinds[word][0]).view(kinds[word][1]))


def fp16(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16))


def check(planes: Planes, expected: Tensor | np.ndarray, scheme: str | None = None) -> None:
    """Products that float32 holds exactly are bit-equal to float64."""
    expected = torch.as_tensor(expected).to(torch.float64)
    found = dequantize(planes[1], planes[0], *expected.shape)
    assert torch.equal(found, expected.to(torch.float32)), (found - expected).abs().max()
    assert scheme in (None, str(planes[0]))


def affine(codes: np.ndarray, zeros: np.ndarray, scales: Tensor, group: np.ndarray) -> np.ndarray:
    return (codes - zeros[:, group]) * scales.double().numpy()[:, group]


GPTQ_BITS = {"gptq": range(2, 9), "gptq_v2": range(2, 9), "gptq_p": (3, 5, 6, 7), "gptqmodel": (2, 4, 8)}


@pytest.mark.parametrize(("form", "bits"), [(form, bits) for form, every in GPTQ_BITS.items() for bits in every])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(rng: np.random.Generator, bits: int, form: str, act_order: bool, symmetric: bool) -> None:
    n, k, size = (64, 96, 32) if form == "gptq_p" else (21, 72, 24)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = np.full((n, k // size), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (n, k // size))
    if form == "gptq":
        zeros[zeros == 0] = 1  # such a file cannot hold it
    scales = fp16(rng, n, k // size)
    group = np.arange(k) // size
    if act_order:
        rng.shuffle(group)
    tensors = {"scales": scales.t(), "g_idx": torch.from_numpy(group.astype(np.int32))}
    if form == "gptq_p":
        tensors |= {"qweight": planar(codes, bits).t(), "qzeros": planar(zeros.T, bits)}
    else:
        stored = zeros.T if form == "gptq_v2" else zeros.T - 1 if form == "gptq" else zeros.T
        words = stream(stored, bits)
        if form == "gptqmodel":
            ones = sum(1 << i for i in range(0, 32, bits))
            words = ((words.to(torch.int64) & 0xFFFFFFFF) - ones).to(torch.int32)
        tensors |= {"qweight": stream(codes, bits).t(), "qzeros": words}
    planes = checkpoints.planes_of_gptq(
        tensors,
        n,
        k,
        bits=bits,
        group_size=size,
        checkpoint_format="gptq" if form == "gptqmodel" else form,
        by_gptqmodel=form == "gptqmodel",
    )
    check(planes, affine(codes, zeros, scales, group))
    assert planes[0].zero == ("none" if symmetric else "int")
    assert planes[0].columns == (("perm",) if act_order else ())


def planar(codes: np.ndarray, bits: int) -> Tensor:
    """Of every 32 codes: their low 4 (or 2) bits, then the next 2, then the last one, each as a stream of its own."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    runs = []
    for run in np.split(codes, codes.shape[1] // 32, axis=1):
        start = 0
        for width in widths:
            runs.append(stream(run >> start & ((1 << width) - 1), width))
            start += width
    return torch.cat(runs, 1)


@pytest.mark.parametrize("g_idx", [np.zeros(64), -np.ones(64), np.arange(64) // 32, None])
def test_gptq_without_act_order(rng: np.random.Generator, g_idx: np.ndarray | None) -> None:
    codes, zeros, scales = rng.integers(0, 16, (8, 64)), rng.integers(1, 16, (8, 2)), fp16(rng, 8, 2)
    tensors = {"qweight": stream(codes, 4).t(), "qzeros": stream(zeros.T - 1, 4), "scales": scales.t()}
    if g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    planes = checkpoints.planes_of_gptq(tensors, 8, 64, bits=4, group_size=32)
    check(planes, affine(codes, zeros, scales, np.arange(64) // 32), "uint4-g32-fp16")


@pytest.mark.parametrize("bad", [2, -1, 1 << 30, "uneven"])
def test_gptq_groups_that_are_not_there(rng: np.random.Generator, bad: int | str) -> None:
    codes, zeros, scales = rng.integers(0, 16, (8, 64)), rng.integers(1, 16, (8, 2)), fp16(rng, 8, 2)
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    g_idx[5] = 1 if bad == "uneven" else bad
    tensors = {"qweight": stream(codes, 4).t(), "qzeros": stream(zeros.T - 1, 4), "scales": scales.t(), "g_idx": g_idx}
    with pytest.raises(CheckpointError, match="'g_idx' "):
        checkpoints.planes_of_gptq(tensors, 8, 64, bits=4, group_size=32)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("version", checkpoints.awq.VERSIONS)
def test_awq(rng: np.random.Generator, group: int, version: str) -> None:
    n, k = 24, 256
    size = k if group == -1 else group
    groups, of = k // size, np.arange(k) // size
    codes, zeros, scales = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, groups)), fp16(rng, n, groups)
    run = {32: 4, 64: 2}.get(size, 1)
    width = (groups + 8 * run - 1) // (8 * run) * run
    if version == "gemm":
        order = [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(n)]
        tensors = {
            "qweight": stream(codes.T[:, order], 4),
            "qzeros": stream(zeros.T[:, order], 4),
            "scales": scales.t(),
        }
    elif version == "gemv":
        padded = np.pad(zeros, ((0, 0), (0, 8 * width - groups)))
        filled = torch.nn.functional.pad(scales, (0, 8 * width - groups))
        tensors = {"qweight": stream(codes, 4), "qzeros": stream(padded, 4), "scales": filled}
    else:
        offsets = (-scales.float() * torch.from_numpy(zeros)).half()
        filled = [torch.nn.functional.pad(t, (0, 8 * width - groups)).t() for t in (scales, offsets)]
        name = "qzeros" if version == "gemv_fast" else "scaled_zeros"
        tensors = {"qweight": fast(codes), "scales": filled[0], name: filled[1]}
    planes = checkpoints.planes_of_awq(tensors, n, k, group_size=group, version=version)
    if version in ("gemm", "gemv"):
        check(planes, affine(codes, zeros, scales, of))
    else:
        found = dequantize(planes[1], planes[0], n, k).double()
        exact = codes * scales.double().numpy()[:, of] + offsets.double().numpy()[:, of]
        assert (found - torch.from_numpy(exact)).abs().max() <= 2.0**-22 * np.abs(exact).max()
        assert planes[0].zero == "bias"


def fast(codes: np.ndarray) -> Tensor:
    """One code at a time to its place: four rows take turns in runs of 64 columns."""
    n, k = codes.shape
    out = np.zeros((n // 4, k), np.uint16)
    for row, column in np.ndindex(n, k):
        eight, pair, odd = column % 32 // 8, column % 8 // 2, column % 2
        place = (column // 64 * 4 + row % 4) * 64 + column % 64 // 32 * 32 + pair * 8 + odd * 4 + eight
        out[row // 4, place // 4] |= codes[row, column] << (4 * (place % 4))
    return torch.from_numpy(out.view(np.int16))


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("plain_zeros", [False, True])
def test_compressed_tensors_before_018(rng: np.random.Generator, bits: int, act_order: bool, plain_zeros: bool) -> None:
    """Words of whole fields, and groups of columns that do not stand together."""
    n, k, half = 22, 198, 1 << (bits - 1)
    codes, zeros, scales = rng.integers(-half, half, (n, k)), rng.integers(-half, half, (n, 3)), fp16(rng, n, 3)
    group = np.arange(k) // 66
    if act_order:
        rng.shuffle(group)
    tensors = {
        "weight_packed": whole_fields(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
        "weight_g_idx": torch.from_numpy(group.astype(np.int32)),
        "weight_zero_point": torch.from_numpy(zeros.astype(np.int8))
        if plain_zeros
        else whole_fields(zeros.T + half, bits).t(),
    }
    planes = checkpoints.planes_of_compressed_tensors(tensors, n, k, format="pack-quantized", bits=bits, group_size=66)
    check(planes, affine(codes, zeros, scales, group))


def whole_fields(codes: np.ndarray, bits: int) -> Tensor:
    per_word = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    return torch.cat([stream(part, bits) for part in np.split(codes, codes.shape[1] // per_word, axis=1)], 1)


@pytest.mark.parametrize(("bits", "element"), [(4, "e2m1"), (6, "e2m3"), (8, "fp8")])
def test_microscaling(rng: np.random.Generator, bits: int, element: str) -> None:
    n, k = 5, 96
    codes, exponents = rng.integers(0, 1 << bits, (n, k)), rng.integers(100, 150, (n, 3)).astype(np.uint8)
    if bits == 8:
        codes[(codes & 127) == 127] = 0  # nan
    sign, magnitude = 1 - 2.0 * (codes >> (bits - 1)), codes & ((1 << (bits - 1)) - 1)
    fraction, bias = {4: 1, 6: 3, 8: 3}[bits], {4: 1, 6: 1, 8: 7}[bits]
    exponent, mantissa = magnitude >> fraction, magnitude % (1 << fraction) / (1 << fraction)
    values = sign * np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias))
    expected = values * 2.0 ** (exponents.astype(int) - 127)[:, np.arange(k) // 32]
    packed, scales = stream(codes, bits, 8), torch.from_numpy(exponents)
    name = {4: "mxfp4", 6: "mxfp6", 8: "mxfp8"}[bits]
    calls = checkpoints
    form = f"{name}-quantized" if bits == 8 else f"{name}-pack-quantized"
    weight = packed.view(torch.float8_e4m3fn) if bits == 8 else packed
    key = "weight" if bits == 8 else "weight_packed"
    check(calls.planes_of_compressed_tensors({key: weight, "weight_scale": scales}, n, k, format=form), expected, name)
    if bits == 6:
        return
    both = {"weight": weight, "weight_scale": scales}
    check(calls.planes_of_modelopt(both, n, k, quant_algo=name.upper()), expected, name)
    check(calls.planes_of_mlx({"weight": stream(codes, bits), "scales": scales}, n, k, mode=name), expected, name)
    e8m0 = {"weight": weight, "scale": scales.view(torch.float8_e8m0fnu)}
    if bits == 4:
        check(calls.planes_of_quark(both, n, k, dtype="fp4"), expected, name)
        check(calls.planes_of_fp8({**e8m0, "weight": weight.view(torch.int8)}, n, k), expected, name)
        check(calls.planes_of_gpt_oss({"blocks": packed.view(n, 3, 16), "scales": scales}, n, k), expected, name)
    else:
        check(calls.planes_of_fp8(e8m0, n, k, weight_block_size=(1, 32)), expected, name)


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "W8A8_SQ_PER_CHANNEL"])
def test_modelopt_in_8_bits(rng: np.random.Generator, algorithm: str) -> None:
    n, k = 200, 140
    shape = {"FP8": (), "fp8_pb_wo": (2, 1, 2, 1)}.get(algorithm, (n,))
    scales = torch.from_numpy(np.asarray(2.0 ** rng.integers(-4, 4, shape), np.float32))
    codes = torch.from_numpy(rng.integers(-100, 100, (n, k)))
    weight = codes.to(torch.int8 if algorithm.startswith("W8A8") else torch.float8_e4m3fn)
    spread = scales.view(2, 2)[torch.arange(n) // 128][:, torch.arange(k) // 128] if scales.ndim == 4 else scales
    spread = spread[:, None] if spread.ndim == 1 else spread
    planes = checkpoints.planes_of_modelopt({"weight": weight, "weight_scale": scales}, n, k, quant_algo=algorithm)
    check(planes, weight.double() * spread.double())


def test_modelopt_awq(rng: np.random.Generator) -> None:
    n, k = 6, 256
    codes, scales = rng.integers(-8, 8, (n, k)), torch.from_numpy(2.0 ** rng.integers(-4, 4, (n, 2))).float()
    fields = codes & 15
    before = torch.from_numpy(rng.integers(1, 200, k)).bfloat16()
    tensors = {
        "weight": torch.from_numpy((fields[::2] | fields[1::2] << 4).astype(np.uint8)),
        "weight_scale": scales,
        "weight_scale_2": torch.tensor(3.0),
        "pre_quant_scale": before,
    }
    planes = checkpoints.planes_of_modelopt(tensors, n, k, quant_algo="W4A8_AWQ", group_size=128)
    check(
        planes, codes * scales.double().numpy()[:, np.arange(k) // 128] * before.double().numpy(), "int4-fp32-colscale"
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mlx(rng: np.random.Generator, bits: int, dtype: torch.dtype) -> None:
    n, k = 5, 128
    codes = rng.integers(0, 1 << bits, (n, k))
    scales, biases = (torch.from_numpy(rng.integers(-60, 60, (n, 2)) / 64).to(dtype) for _ in range(2))
    of = np.arange(k) // 64
    tensors = {"weight": stream(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
    planes = checkpoints.planes_of_mlx(tensors, n, k, bits=bits, group_size=64)
    check(planes, codes * scales.double().numpy()[:, of] + biases.double().numpy()[:, of])


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("method", ["reorder", "order"])
def test_quark(rng: np.random.Generator, dtype: str, method: str) -> None:
    n, k, low = 16, 64, -8 if dtype == "int4" else 0
    codes, zeros, scales = rng.integers(low, low + 16, (n, k)), rng.integers(low, low + 16, (n, 2)), fp16(rng, n, 2)
    order = [8 * (i // 8) + (AWQ_ORDER[i % 8] if method == "reorder" else i % 8) for i in range(n)]
    tensors = {
        "weight": stream((codes & 15).T[:, order], 4),
        "weight_zero_point": stream((zeros & 15).T[:, order], 4),
        "weight_scale": scales.t(),
    }
    planes = checkpoints.planes_of_quark(tensors, n, k, dtype=dtype, group_size=32, pack_method=method)
    check(planes, affine(codes, zeros, scales, np.arange(k) // 32))


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize("rows", [False, True])
def test_quark_in_8_bits(rng: np.random.Generator, dtype: str, rows: bool) -> None:
    codes, scales = torch.from_numpy(rng.integers(-15, 16, (6, 10))), fp16(rng, *((6,) if rows else ())).float()
    weight = codes.to(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": scales, "input_scale": torch.tensor(0.5)}
    activation = Activation("int8" if dtype == "int8" else "fp8", static=True)
    planes = checkpoints.planes_of_quark(tensors, 6, 10, dtype=dtype, activation=activation)
    check(planes, codes * (scales.double()[:, None] if rows else scales.double()))
    assert planes[1]["input_scale"].tolist() == [0.5]


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_bitnet(rng: np.random.Generator, linear_class: str) -> None:
    n, k = 16, 21
    codes, scale = rng.integers(-1, 2, (n, k)), 0.25
    packed = sum((codes[i * 4 : i * 4 + 4] + 1) << (2 * i) for i in range(4))
    tensors = {"weight": torch.from_numpy(packed.astype(np.uint8)), "weight_scale": torch.tensor([scale]).bfloat16()}
    expected = codes / scale if linear_class == "bitlinear" else codes * scale
    planes = checkpoints.planes_of_bitnet(tensors, n, k, linear_class=linear_class, activation=Activation("int8"))
    check(planes, expected)
    with pytest.raises(CheckpointError, match="none of -1, 0 and 1"):
        checkpoints.planes_of_bitnet({**tensors, "weight": torch.full_like(tensors["weight"], 255)}, n, k)


def test_eetq(rng: np.random.Generator) -> None:
    """One code at a time to its place, by the four steps of the preprocessor."""
    n, k = 6, 128
    codes, scales = rng.integers(-128, 128, (n, k)), fp16(rng, n)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    stored = np.zeros(n * k, np.uint8)
    for row, column in np.ndindex(n, k):
        moved = column // 16 * 16 + order.index(column % 16)
        place = row // 2 * 2 * k + (moved // 64 * 2 + row % 2) * 64 + moved % 64
        place = place // 4 * 4 + (0, 2, 1, 3)[place % 4]
        stored[place] = codes[row, column] + 128
    tensors = {"weight": torch.from_numpy(stored.view(np.int8)).view(k, n), "weight_scales": scales}
    check(checkpoints.planes_of_eetq(tensors, n, k), codes * scales.double().numpy()[:, None], "int8-fp16")


@pytest.mark.parametrize("inner", [2, 4])
def test_tinygemm(rng: np.random.Generator, inner: int) -> None:
    """A lane of a warp has eight codes of a row: two of each eight columns, of two pairs, of `inner` tiles by 16."""
    n, k, size = 12, 96, 32
    rows, columns = 16, 128
    codes = rng.integers(0, 16, (rows, columns))
    words = np.zeros((rows // 8, columns // (16 * inner), 32, inner // 2), np.uint32)
    for row, column in np.ndindex(rows, columns):
        across, inside = divmod(column, 16 * inner)
        tile, place = divmod(inside, 16)
        lane = row % 8 * 4 + place % 8 // 2
        code = tile % 2 * 4 + place // 8 * 2 + place % 2
        nibble = (0, 4, 1, 5, 2, 6, 3, 7)[code]
        words[row // 8, across, lane, tile // 2] |= np.uint32(codes[row, column] << (4 * nibble))
    both = torch.from_numpy(rng.integers(-60, 60, (columns // size, rows, 2)) / 64).bfloat16()
    tensors = {"_weight_qdata": torch.from_numpy(words.view(np.int32)), "_weight_scale_and_zero": both}
    planes = checkpoints.planes_of_torchao(tensors, n, k, kind="Int4TilePackedTo4dTensor", block_size=(1, size))
    scales, zeros = both.double().numpy()[np.arange(k) // size, :n].transpose(2, 1, 0)
    check(planes, (codes[:n, :k] - 8) * scales + zeros, "int4-g32-bias")


@pytest.mark.parametrize(
    ("bits", "count", "rows", "columns"), [(8, 2, 1, 8), (16, 1, 1, 8), (8, 4, 2, 4), (3, 3, 1, 2)]
)
def test_aqlm(rng: np.random.Generator, bits: int, count: int, rows: int, columns: int) -> None:
    n, k = 6, 32
    codes = rng.integers(0, 1 << bits, (n // rows, k // columns, count))
    books = torch.from_numpy(rng.integers(-8, 8, (count, 1 << bits, rows, columns)) / 4).half()
    scales = fp16(rng, n // rows, 1, 1, 1)
    dtype = np.uint8 if bits <= 8 else np.uint16
    tensors = {
        "codes": torch.from_numpy(codes.astype(dtype).view(np.int8 if bits <= 8 else np.int16)),
        "codebooks": books,
        "scales": scales,
    }
    expected = torch.zeros(n, k, dtype=torch.float64)
    for row, column in np.ndindex(n, k):
        at = codes[row // rows, column // columns]
        entries = [books[i, at[i], row % rows, column % columns].double() for i in range(count)]
        expected[row, column] = sum(entries) * scales[row // rows].double().item()
    check(checkpoints.planes_of_aqlm(tensors, n, k, bits=bits), expected)


@pytest.mark.parametrize("residual", [0, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("columns", [False, True])
def test_vptq(rng: np.random.Generator, residual: int, groups: int, columns: bool) -> None:
    n, k, size, entries = 12, 32, 4, 64
    width = 6 + (3 if residual else 0)
    indices = rng.integers(0, 1 << width, (groups, n // size, k // groups))
    books = torch.from_numpy(rng.integers(-8, 8, (groups, entries, size)) / 4).half()
    rest = torch.from_numpy(rng.integers(-8, 8, (groups, max(residual, 1), size)) / 64).half()
    tensors = {
        "indices": torch.stack([stream(part, width) for part in indices]),
        "centroids.weight": books.reshape(groups, -1),
    }
    perm, scale, bias = rng.permutation(k), np.ones(k), np.zeros(k)
    if residual:
        tensors["res_centroids.weight"] = rest.reshape(groups, -1)
    if columns:
        scale, bias = rng.integers(1, 9, k) / 8, rng.integers(-8, 8, k) / 8
        tensors["perm"] = torch.from_numpy(perm.astype(np.uint16).view(np.int16))
        tensors |= {"weight_scale": torch.from_numpy(scale).half(), "weight_bias": torch.from_numpy(bias).half()}
    expected = torch.zeros(n, k, dtype=torch.float64)
    for row, column in np.ndindex(n, k):
        group, inside = divmod(column, k // groups)
        index = indices[group, row // size, inside]
        value = books[group, index % entries, row % size].double()
        if residual:
            value = value + rest[group, index // entries, row % size].double()
        to = perm[column] if columns else column
        expected[row, to] = value * scale[to] + bias[to]
    settings = {"vector_size": size, "centroids": entries, "residual_centroids": residual}
    check(checkpoints.planes_of_vptq(tensors, n, k, **settings), expected)
    with pytest.raises(CheckpointError, match="outliers"):
        checkpoints.planes_of_vptq({**tensors, "outlier_indices": torch.zeros(1)}, n, k, **settings)
    if columns:
        twice = {**tensors, "perm": torch.zeros(k, dtype=torch.int16)}
        with pytest.raises(CheckpointError, match="no permutation"):
            checkpoints.planes_of_vptq(twice, n, k, **settings)
