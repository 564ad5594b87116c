"""The denoiser's graph in five parts, so that each runs as often and as precisely as it has to.

    timestep   what follows from the timestep alone (its embedding)         once a step for a sample, float32: bfloat16
               cannot tell
                                                                            777 from 776
    sample     what follows from the latents, but not from the text         once a step for a sample: with guidance,
               both rows of a
                                                                            sample are one until they first see their
                                                                            texts
    context    what follows from the text alone (its keys and values)       once a loop for a row
    unet       the rest of the U-Net                                        once a step for a row
    sampler    what follows from mixing and update (guidance, sampler)      once a step, float32: errors in the state
               would add up

A part is found by what its operations depend on, so nothing here knows how the U-Net was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BackendError

SAMPLER_INPUTS = frozenset({"mixing", "update"})
SAMPLE_INPUTS = frozenset({"state", "row_sample", "timestep"})

Cut = list[tuple[Any, Any]]
"""Values that leave a part, and the new inputs that take their place."""


@dataclass(frozen=True)
class Parts:
    """OpenVINO models. `timestep` and `sample` are for as many rows as there are samples. `sample` takes state,
    row_sample and the outputs of `timestep`; `unet` takes row_sample and the outputs of `timestep`, of `sample` and of
    `context`; `sampler` takes state, mixing, update, noise and the outputs of `unet`."""

    timestep: Any
    sample: Any
    context: Any
    unet: Any
    sampler: Any


def fix_shapes(library: Any, model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Makes the model one for inputs of these shapes only, without operations that ask for a shape or for a type."""
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ConvertLike":
            _replace(
                node.output(0).get_target_inputs(),
                library.opset13.convert(node.input_value(0), node.get_output_element_type(0).get_type_name()),
            )
        if node.get_type_name() == "ShapeOf":
            shape = np.array(list(node.input_value(0).get_shape()), node.get_element_type().to_dtype())
            _replace(node.output(0).get_target_inputs(), library.opset13.constant(shape))


def split(library: Any, one: Any, model: Any) -> Parts:
    """The parts of a denoiser whose shapes are fixed: `model` for all rows, `one` for a row of each sample. Neither is
    usable afterwards. BackendError if what the rows of a sample have in common does not have the rows first."""
    inputs = _inputs(one)
    needs = _dependencies(one)
    timestep = _cut(library, one, needs, _of_timestep)
    sample = _cut(library, one, needs, _of_sample)
    parts = {
        "timestep": library.Model(_values(timestep), [inputs["timestep"]], "timestep"),
        "sample": library.Model(
            _values(sample), [inputs["state"], inputs["row_sample"], *_parameters(timestep)], "sample"
        ),
    }
    inputs = _inputs(model)
    needs = _dependencies(model)
    rows = _cut(library, model, needs, _of_timestep) + _cut(library, model, needs, _of_sample)
    shared = [
        _for_each_row(library, value, row, inputs["row_sample"])
        for (value, _), (_, row) in zip(timestep + sample, rows, strict=True)
    ]
    context = _cut(library, model, needs, lambda names: names == {"context"})
    unet = _cut(library, model, needs, lambda names: "context" in names and not names & SAMPLER_INPUTS)
    parts["context"] = library.Model(_values(context), [inputs["context"]], "context")
    parts["unet"] = library.Model(_values(unet), [inputs["row_sample"], *shared, *_parameters(context)], "unet")
    parts["sampler"] = library.Model(
        model.get_results(),
        [inputs[name] for name in ("state", "mixing", "update", "noise")] + _parameters(unet),
        "sampler",
    )
    return Parts(**parts)


def _of_timestep(names: frozenset[str]) -> bool:
    return names == {"timestep"}


def _of_sample(names: frozenset[str]) -> bool:
    return {"state", "row_sample"} <= names <= SAMPLE_INPUTS


def _for_each_row(library: Any, value: Any, row: Any, row_sample: Any) -> Any:
    """A new input of the shape of `value`, which has one row for each sample; `row`, which has all rows, is gathered
    from it."""
    each, wanted = list(value.get_shape()), list(row.get_output_shape(0))
    if not each or each[1:] != wanted[1:]:
        raise BackendError(
            f"the denoiser's graph cannot be shared by the rows of a sample: {value.get_node().get_friendly_name()} "
            f"has shape {each} for a row "
            f"of each sample and {wanted} for all rows; pass backend='onnxruntime'"
        )
    op = library.opset13
    parameter = op.parameter(each, value.get_element_type())
    _replace(row.output(0).get_target_inputs(), op.gather(parameter, row_sample, op.constant(np.array(0, np.int32))))
    return parameter


def _inputs(model: Any) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_parameters()}


def _values(cut: Cut) -> list[Any]:
    return [value for value, _ in cut]


def _parameters(cut: Cut) -> list[Any]:
    return [parameter for _, parameter in cut]


def _dependencies(model: Any) -> dict[str, frozenset[str]]:
    """For every operation the names of the model's inputs that it depends on."""
    needs: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        sources = [needs[value.get_node().get_friendly_name()] for value in node.input_values()]
        own = {node.get_friendly_name()} if node.get_type_name() == "Parameter" else set()
        needs[node.get_friendly_name()] = frozenset(own).union(*sources)
    return needs


def _cut(
    library: Any, model: Any, needs: Mapping[str, frozenset[str]], inside: Callable[[frozenset[str]], bool]
) -> Cut:
    """Cuts what is inside off the rest."""
    cut: Cut = []
    for node in model.get_ordered_ops():
        if (
            node.get_friendly_name() not in needs
            or node.get_type_name() == "Parameter"
            or not inside(needs[node.get_friendly_name()])
        ):
            continue
        for value in node.outputs():
            users = [
                user for user in value.get_target_inputs() if not inside(needs[user.get_node().get_friendly_name()])
            ]
            if users:
                parameter = library.opset13.parameter(value.get_shape(), value.get_element_type())
                _replace(users, parameter)
                cut.append((value, parameter))
    return cut


def _replace(users: Any, node: Any) -> None:
    for user in list(users):
        user.replace_source_output(node.output(0))
