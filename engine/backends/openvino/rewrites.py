"""Rewrites of a graph that give the same result with less work. OpenVINO does not do these itself. Shapes must be
fixed.

    fold_upsampling   A 3 x 3 convolution of an image doubled by repeating its pixels sees only 2 x 2 different ones. So
                      it is four
                      2 x 2 convolutions of the small image, one for each pixel of a 2 x 2 block: 4/9 of the operations.
    halve_linears     A linear layer whose output is split in halves, as GEGLU's is, becomes two layers: nothing has to
                      be copied
                      apart, and GELU and product are done where the layers write.

In exact arithmetic nothing changes. Weights are added in float32, which rounds once more. `keep` copies the new weights
to where they stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Keep = Callable[[np.ndarray], np.ndarray]

FOLD = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""FOLD[p] @ (three weights in a row) = the two weights for the even (p = 0) or odd pixels of a row whose pixels are
doubled."""


def fold_upsampling(library: Any, model: Any, keep: Keep) -> None:
    """Replaces doubling and one convolution by four convolutions of the small image."""
    for node in model.get_ordered_ops():
        if not (
            node.get_type_name() == "Convolution" and _doubles(node.input_value(0).get_node()) and _keeps_size(node)
        ):
            continue
        weights = node.input_value(1).get_node()
        if weights.get_type_name() == "Constant":
            bias = _added_constant(node)
            old = node if bias is None else next(iter(node.output(0).get_target_inputs())).get_node()
            _replace(
                old, _four_convolutions(library, node.input_value(0).get_node().input_value(0), weights, bias, keep)
            )


def _four_convolutions(library: Any, image: Any, weights: Any, bias: Any, keep: Keep) -> Any:
    op, pixels, exact = library.opset13, [], _float32(library, weights)
    for y in (0, 1):
        for x in (0, 1):
            folded = np.einsum("ay,oiyx,bx->oiab", FOLD[y], exact, FOLD[x], optimize=True)
            pixel = op.convolution(
                image, _constant_like(library, folded, weights, keep), [1, 1], [1 - y, 1 - x], [y, x], [1, 1]
            )
            pixels.append(pixel if bias is None else op.add(pixel, bias))
    return op.depth_to_space(op.concat(pixels, 1), "blocks_first", 2)


def _doubles(node: Any) -> bool:
    """Whether a node makes an image twice as large by repeating every pixel."""
    if (
        node.get_type_name() != "Interpolate"
        or node.get_output_partial_shape(0).is_dynamic
        or node.get_input_partial_shape(0).is_dynamic
    ):
        return False
    found, (before, after) = (
        node.get_attributes(),
        (list(node.input_value(0).get_shape()), list(node.get_output_shape(0))),
    )
    plain = (found["mode"], found["coordinate_transformation_mode"], found["nearest_mode"]) == (
        "nearest",
        "asymmetric",
        "floor",
    )
    return (
        plain
        and not any((*found["pads_begin"], *found["pads_end"]))
        and after == [*before[:2], *(2 * size for size in before[2:])]
    )


def _keeps_size(convolution: Any) -> bool:
    """Whether a convolution is 3 x 3 with a border of one."""
    found = convolution.get_attributes()
    return (
        list(convolution.input_value(1).get_shape())[2:] == [3, 3]
        and found["auto_pad"] == "explicit"
        and all(list(found[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    )


def _added_constant(node: Any) -> Any:
    """The constant, one number a channel, that is added to a node's output, if nothing else uses that output. Otherwise
    None."""
    users = [user.get_node() for user in node.output(0).get_target_inputs()]
    if len(users) != 1 or users[0].get_type_name() != "Add":
        return None
    other = next((value for value in users[0].input_values() if value.get_node() != node), None)
    if (
        other is None
        or list(other.get_shape()) != [1, node.get_output_shape(0)[1], 1, 1]
        or not _constant_value(other.get_node())
    ):
        return None
    return other


def _constant_value(node: Any) -> bool:
    return node.get_type_name() == "Constant" or (
        node.get_type_name() != "Parameter" and all(_constant_value(value.get_node()) for value in node.input_values())
    )


def halve_linears(library: Any, model: Any, keep: Keep) -> None:
    """Replaces a linear layer whose output is split in halves by two linear layers."""
    op = library.opset13
    for node in model.get_ordered_ops():
        layer = _halved_linear(node)
        if layer is None:
            continue
        x, weights, bias = layer
        columns, added = (
            np.split(_float32(library, weights), 2, axis=1),
            np.split(_float32(library, bias).reshape(-1), 2),
        )
        for output, some, constant in zip(node.outputs(), columns, added):
            half = op.add(
                op.matmul(x, _constant_like(library, some, weights, keep), False, False),
                _constant_like(library, constant, bias, keep),
            )
            _redirect(output, half)


def _halved_linear(node: Any) -> tuple[Any, Any, Any] | None:
    """Input, weights [in, out] and bias of the linear layer whose output this node splits in halves, if nothing else
    uses that output. Otherwise None."""
    if node.get_type_name() != "Split" or node.get_attributes()["num_splits"] != 2:
        return None
    add, axis = (value.get_node() for value in node.input_values())
    if (
        add.get_type_name() != "Add"
        or len(add.output(0).get_target_inputs()) != 1
        or axis.get_type_name() != "Constant"
    ):
        return None
    product, bias = (value.get_node() for value in add.input_values())
    if (
        product.get_type_name() != "MatMul"
        or bias.get_type_name() != "Constant"
        or int(axis.data) not in (-1, len(add.get_output_partial_shape(0)) - 1)
    ):
        return None
    weights = product.input_value(1).get_node()
    if (
        weights.get_type_name() != "Constant"
        or len(weights.get_output_shape(0)) != 2
        or any(product.get_attributes().values())
    ):
        return None
    return product.input_value(0), weights, bias


def _float32(library: Any, constant: Any) -> np.ndarray:
    """A constant's values. OpenVINO shows the bits of bfloat16, which NumPy does not have, as float16."""
    raw = np.asarray(constant.data)
    if constant.get_element_type() == library.Type.bf16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def _constant_like(library: Any, values: np.ndarray, model: Any, keep: Keep) -> Any:
    """float32 values as a constant of the type of `model`."""
    if model.get_element_type() != library.Type.bf16:
        return library.op.Constant(keep(values.astype(np.asarray(model.data).dtype, copy=False)), shared_memory=True)
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even
    return library.op.Constant(
        library.Tensor(rounded, library.Shape(list(values.shape)), library.Type.bf16), shared_memory=False
    )


def _replace(old: Any, new: Any) -> None:
    _redirect(old.output(0), new)


def _redirect(output: Any, new: Any) -> None:
    for user in list(output.get_target_inputs()):
        user.replace_source_output(new.output(0))


REWRITES = (fold_upsampling, halve_linears)
