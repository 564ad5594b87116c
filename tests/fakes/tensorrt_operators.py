"""What the fake's ONNX parser refuses: operators that a version does not know, and those that it reads as something
else."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

KNOWN_TO_8 = frozenset(json.loads((Path(__file__).parent / "api-8.6.0.json").read_text())["operators"])
"""The operators to which the real parser of 8.6.0 says yes."""

UNKNOWN = {"10": frozenset({"Swish"}), "11": frozenset({"Swish"})}
"""Operators that later parsers refuse, as far as a test needs one."""

AXES_AS_INPUT = frozenset(
    {
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
    }
)
"""Since opset 18 their axes are an input, as ReduceSum's are since 13; the importers of 8.6 read an attribute and,
without one, reduce everything."""


def supports(operator: str, major: str) -> bool:
    """What supports_operator answers."""
    return operator in KNOWN_TO_8 if major == "8" else operator not in UNKNOWN[major]


def misread(node: onnx.NodeProto, major: str) -> str | None:
    """What the importers of 8.6 (builtin_op_importers.cpp, release/8.6-EA) silently read as something else, in words.
    Of the real parser's graph the build fails, or worse; the fake refuses it at once."""
    if major != "8":
        return None
    attributes = {
        attribute.name: attribute.i for attribute in node.attribute if attribute.type == onnx.AttributeProto.INT
    }
    if node.op_type == "Shape" and (attributes.get("start", 0) != 0 or "end" in attributes):
        return "Shape with start or end: both are ignored, and the whole shape is taken"
    if node.op_type in AXES_AS_INPUT and len(node.input) > 1 and node.input[1]:
        return f"{node.op_type} with its axes as an input: it is ignored, and everything is reduced"
    return None


def attention_without_a_kernel(dtype: str, head_size: int | str) -> str | None:
    """Why TensorRT 10.14 and later build no Attention of that type and head size: the importer makes an IAttention that
    may not be taken apart, and fused kernels are for half precision, head sizes from 16 to 256 in steps of 8
    (NVIDIA/TensorRT issues 2981, 4167, 4705). Kernels in float are not documented."""
    if dtype not in ("HALF", "BF16"):
        return f"Attention in {dtype}"
    if isinstance(head_size, int) and not (16 <= head_size <= 256 and head_size % 8 == 0):
        return f"Attention with a head size of {head_size}"
    return None
