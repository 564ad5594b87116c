"""Puts other weights into a graph that OpenVINO has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import BackendError


def replace_weights(library: Any, model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Replaces the constants of these names. The arrays have the graph's types; uint16 stands for bfloat16. OpenVINO
    keeps using the arrays. BackendError for a name that the graph does not have."""
    missing = set(weights)
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name in weights:
            made = _constant(library, weights[name], node)
            made.set_friendly_name(name)
            for user in list(node.output(0).get_target_inputs()):
                user.replace_source_output(made.output(0))
            missing.discard(name)
    if missing:
        raise BackendError(
            f"OpenVINO {library.__version__} has read the graph without a weight named {sorted(missing)[0]!r}, so no "
            "adapter can change it; use backend='onnxruntime'"
        )


def _constant(library: Any, array: np.ndarray, old: Any) -> Any:
    if old.get_element_type() != library.Type.bf16:
        return library.op.Constant(np.ascontiguousarray(array), shared_memory=True)
    tensor = library.Tensor(np.ascontiguousarray(array), library.Shape(list(array.shape)), library.Type.bf16)
    return library.op.Constant(tensor, shared_memory=True)
