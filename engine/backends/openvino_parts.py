"""The denoiser's graph in four parts, so that each runs as often and as precisely as it has to.

    timestep   what follows from the timestep alone (its embedding)         once a step, float32: bfloat16 cannot tell 777 from 776
    context    what follows from the text alone (its keys and values)       once a loop
    unet       the rest of the U-Net                                        once a step
    sampler    what follows from mixing and update (guidance, sampler)      once a step, float32: errors in the state would add up

A part is found by what its operations depend on, so nothing here knows how the U-Net was traced.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLER_INPUTS = frozenset({"mixing", "update"})


@dataclass(frozen=True)
class Parts:
    """OpenVINO models. `unet` takes state and row_sample, then the outputs of `timestep`, then those of `context`; `sampler` takes
    state, mixing, update and noise, then the outputs of `unet`."""

    timestep: Any
    context: Any
    unet: Any
    sampler: Any


def fix_shapes(library: Any, model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Makes the model one for inputs of these shapes only, without operations that ask for a shape."""
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ShapeOf":
            shape = np.array(list(node.input_value(0).get_shape()), node.get_element_type().to_dtype())
            _replace(node.output(0).get_target_inputs(), library.opset13.constant(shape))


def split(library: Any, model: Any) -> Parts:
    """The parts of a denoiser whose shapes are fixed. The model itself is not usable afterwards."""
    needs = _dependencies(model)
    inputs = {node.get_friendly_name(): node for node in model.get_parameters()}
    timestep = _cut(library, model, needs, lambda names: names == {"timestep"})
    context = _cut(library, model, needs, lambda names: names == {"context"})
    unet = _cut(library, model, needs, lambda names: bool(names & {"timestep", "context"}) and not names & SAMPLER_INPUTS)
    return Parts(
        library.Model(timestep[0], [inputs["timestep"]], "timestep"),
        library.Model(context[0], [inputs["context"]], "context"),
        library.Model(unet[0], [inputs["state"], inputs["row_sample"], *timestep[1], *context[1]], "unet"),
        library.Model(model.get_results(), [inputs[name] for name in ("state", "mixing", "update", "noise")] + unet[1], "sampler"))


def _dependencies(model: Any) -> dict[str, frozenset[str]]:
    """For every operation the names of the model's inputs that it depends on."""
    needs: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        sources = [needs[value.get_node().get_friendly_name()] for value in node.input_values()]
        own = {node.get_friendly_name()} if node.get_type_name() == "Parameter" else set()
        needs[node.get_friendly_name()] = frozenset(own).union(*sources)
    return needs


def _cut(library: Any, model: Any, needs: Mapping[str, frozenset[str]], inside: Callable[[frozenset[str]], bool]) -> tuple[list[Any], list[Any]]:
    """The values that leave a part, and the new inputs that take their place in what used them."""
    values, parameters = [], []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter" or not inside(needs[node.get_friendly_name()]):
            continue
        for value in node.outputs():
            users = [user for user in value.get_target_inputs() if not inside(needs[user.get_node().get_friendly_name()])]
            if users:
                parameter = library.opset13.parameter(value.get_shape(), value.get_element_type())
                _replace(users, parameter)
                values.append(value)
                parameters.append(parameter)
    return values, parameters


def _replace(users: Any, node: Any) -> None:
    for user in list(users):
        user.replace_source_output(node.output(0))
