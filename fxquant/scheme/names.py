"""Schemes with a name of their own, by what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NAMES: Mapping[str, str] = MappingProxyType(
    {
        # OCP Microscaling v1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
        "mxfp4": "e2m1-g32-e8m0",
        "mxfp6": "e2m3-g32-e8m0",
        "mxfp6e3m2": "e3m2-g32-e8m0",
        "mxfp8": "fp8-g32-e8m0",
        "mxfp8e5m2": "fp8e5m2-g32-e8m0",
        # NVIDIA's 4-bit format: e4m3 scales per 16 under one float32 scale
        "nvfp4": "e2m1-g16-e4m3*fp32",
        # LLM.int8, arXiv 2208.07339, with the threshold that it uses
        "llm-int8": "int8+int8-outlier6",
        # BitNet b1.58, arXiv 2402.17764: one scale for all of {-1, 0, 1}
        "bitnet": "ternary-tensor",
        # GGUF's blocks, https://github.com/ggml-org/llama.cpp/blob/b4000/ggml/src/ggml-common.h
        "q4_0": "int4-g32-fp16",
        "q4_1": "uint4-g32-bias-fp16",
        "q5_0": "int5-g32-fp16",
        "q5_1": "uint5-g32-bias-fp16",
        "q8_0": "int8-g32-fp16",
        "q2_k": "uint2-g16-bias-u4*fp16.g256",
        "q3_k": "int3-g16-i6*fp16.g256",
        "q4_k": "uint4-g32-bias-u6*fp16.g256",
        "q5_k": "uint5-g32-bias-u6*fp16.g256",
        "q6_k": "int6-g16-i8*fp16.g256",
        "iq4_nl": "iq4-g32-fp16",
        "iq4_xs": "iq4-g32-i6*fp16.g256",
        "tq1_0": "trit-g256-fp16",
        "tq2_0": "ternary-g256-fp16",
        "q1_0": "table(-1,1)-g128-fp16",
        "q2_0": "table(-1,0,1,2)-g64-fp16",
        "iq1_s": "vq12x8-g32-odd3*fp16.g256",
        "iq1_m": "vq12x8-g16-odd3*fp16.g256",
        "iq2_xxs": "vq8x8s7-g32-odd4*fp16.g256",
        "iq2_xs": "vq9x8s7-g16-odd4*fp16.g256",
        "iq2_s": "vq10x8s8-g16-odd4*fp16.g256",
        "iq3_xxs": "vq8x4s7-g32-odd4*fp16.g256",
        "iq3_s": "vq9x4s8-g32-odd4*fp16.g256",
    }
)
"""`Scheme.parse` takes the name, and a scheme that equals one of these prints as its name."""
