"""A denoising step in five parts, so that each runs as often and as precisely as it has to.

    exact      what follows from exact inputs of a sample alone (the       once a step for a sample, float32: bfloat16
               timestep's embedding)                                       cannot tell 777 from 776
    sample     what else the rows of a sample have in common: with         once a step for a sample
               guidance, both rows are one until they see their texts
    loop       what follows from inputs of the rows that stay the same     once a loop for a row
               (the text's keys and values)
    unet       the rest of the U-Net                                       once a step for a row
    solver     what follows from the solver's inputs (guidance, sampler)   once a step, float32: errors in the state
               would
                                                                           add up

The inputs that an operation depends on decide its part. Nothing here knows a tensor's name, or how the U-Net was
traced. Parts without operations are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...contract import Component
from ...errors import BackendError

Cut = list[tuple[Any, Any]]
"""Values that leave a part, each with the new input that replaces it."""

Names = frozenset[str]


@dataclass(frozen=True)
class Part:
    """An OpenVINO model of a part of the step.

    Its first ports are the contract's `inputs`. The outputs of the parts in `after` follow, in that order. per_sample:
    it has one row for each sample. exact: it runs in float32. often: it runs once a "loop" or once a "step".
    """

    name: str
    model: Any
    inputs: tuple[str, ...]
    after: tuple[str, ...]
    per_sample: bool = False
    exact: bool = False
    often: Literal["loop", "step"] = "step"


class Kinds:
    """Decides an operation's part by the names of the inputs that it depends on."""

    def __init__(self, denoiser: Component) -> None:
        self._solver = frozenset(t.name for t in denoiser.inputs if t.solver)
        self.index = frozenset(t.name for t in denoiser.inputs if t.indexes == "batch")
        model = [t for t in denoiser.inputs if t.name not in self._solver | self.index]
        self._samples = frozenset(t.name for t in model if t.dims[0] == "batch")
        self._rows = frozenset(t.name for t in model if t.dims[0] == "rows")
        self._exact = frozenset(t.name for t in model if t.exact) & self._samples
        self._steady = frozenset(t.name for t in model if t.changes != "step")

    def exact(self, needs: Names) -> bool:
        return bool(needs & self._exact) and needs <= self._exact | self.index

    def sample(self, needs: Names) -> bool:
        shared = bool(needs & self._samples) and bool(needs & self.index) and needs <= self._samples | self.index
        return shared and not self.exact(needs)

    def loop(self, needs: Names) -> bool:
        return bool(needs & self._rows) and needs <= self._steady | self.index

    def unet(self, needs: Names) -> bool:
        return bool(needs & self._rows) and not needs & self._solver and not self.loop(needs)


def fix_shapes(library: Any, model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fixes the shapes of the model's inputs, and replaces operations that read a shape or a type by constants."""
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ConvertLike":
            kind = node.get_output_element_type(0).get_type_name()
            _replace(node.output(0).get_target_inputs(), library.opset13.convert(node.input_value(0), kind))
        if node.get_type_name() == "ShapeOf":
            shape = np.array(list(node.input_value(0).get_shape()), node.get_element_type().to_dtype())
            _replace(node.output(0).get_target_inputs(), library.opset13.constant(shape))


def split(library: Any, denoiser: Component, one: Any, model: Any) -> list[Part]:
    """The parts of a denoiser, in the order in which they run. `model` has all rows and `one` has a row for each
    sample, both with fixed shapes; neither is usable afterwards. BackendError if a value that the rows of a sample
    share does not have the rows as its first dimension."""
    kinds = Kinds(denoiser)
    first, needs = _Cutter(library, denoiser, one), _dependencies(one)
    exact, sample = (_cut(library, one, needs, inside) for inside in (kinds.exact, kinds.sample))
    first.part("exact", exact, per_sample=True, exact=True)
    first.part("sample", sample, per_sample=True)

    rest, needs = _Cutter(library, denoiser, model), _dependencies(model)
    rows = [_cut(library, model, needs, inside) for inside in (kinds.exact, kinds.sample)]
    for name, values, spread in (("exact", exact, rows[0]), ("sample", sample, rows[1])):
        gathered = [
            _for_each_row(library, value, row, rest.inputs[next(iter(kinds.index))])
            for (value, _), (_, row) in zip(values, spread, strict=True)
        ]
        rest.given[name] = gathered
    rest.part("loop", _cut(library, model, needs, kinds.loop), often="loop")
    rest.part("unet", _cut(library, model, needs, kinds.unet))
    rest.add("solver", model.get_results(), exact=True)
    return first.parts + rest.parts


class _Cutter:
    """Collects the parts that are cut off one model, and the new inputs that replace values of other parts."""

    def __init__(self, library: Any, denoiser: Component, model: Any) -> None:
        self._library, self._denoiser = library, denoiser
        self.inputs = {node.get_friendly_name(): node for node in model.get_parameters()}
        self.given: dict[str, list[Any]] = {}
        self.parts: list[Part] = []

    def part(
        self,
        name: str,
        cut: Cut,
        per_sample: bool = False,
        exact: bool = False,
        often: Literal["loop", "step"] = "step",
    ) -> None:
        """Adds what was cut off as a part, unless that is nothing."""
        if cut:
            self.add(name, [value for value, _ in cut], per_sample, exact, often)
            self.given[name] = [parameter for _, parameter in cut]

    def add(
        self,
        name: str,
        values: Sequence[Any],
        per_sample: bool = False,
        exact: bool = False,
        often: Literal["loop", "step"] = "step",
    ) -> None:
        """Adds a part with these outputs. Its ports are the inputs that they are computed from."""
        reached = _reached(values)
        inputs = tuple(one for one in self._denoiser.input_names if one in reached)
        after = tuple(
            other for other, given in self.given.items() if any(one.get_friendly_name() in reached for one in given)
        )
        ports = [self.inputs[one] for one in inputs] + [port for other in after for port in self.given[other]]
        model = self._library.Model(list(values), ports, name)
        self.parts.append(Part(name, model, inputs, after, per_sample, exact, often))


def _reached(values: Sequence[Any]) -> set[str]:
    """The names of the inputs that values are computed from."""
    names, seen = set[str](), set[str]()
    waiting = [value.get_node() if hasattr(value, "get_node") else value for value in values]
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        if node.get_type_name() == "Parameter":
            names.add(name)
        waiting += [value.get_node() for value in node.input_values()]
    return names


def _for_each_row(library: Any, value: Any, row: Any, row_sample: Any) -> Any:
    """Makes a new input of the shape of `value`, which has one row for each sample, and replaces `row`, which has all
    rows, by a gather from it."""
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


def _dependencies(model: Any) -> dict[str, frozenset[str]]:
    """For every operation, the names of the model's inputs that it depends on."""
    needs: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        sources = [needs[value.get_node().get_friendly_name()] for value in node.input_values()]
        own = {node.get_friendly_name()} if node.get_type_name() == "Parameter" else set()
        needs[node.get_friendly_name()] = frozenset(own).union(*sources)
    return needs


def _cut(
    library: Any, model: Any, needs: Mapping[str, frozenset[str]], inside: Callable[[frozenset[str]], bool]
) -> Cut:
    """Cuts the operations that are `inside` off the rest."""
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
