"""Exports one component of a model as a graph and compares it with torch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import torch

from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.bundle import sha256
from engine.contract import Component
from engine.manifest import TOKEN_TABLE, Graph, graph_file

from .building import Report
from .compare import as_json
from .disk import require_disk
from .graphs.precision import DTYPES, round_weights
from .graphs.recipes import Recipe
from .graphs.text_encoder import token_table
from .graphs.tracing import export_onnx
from .graphs.weights import parameter_names, write_table
from .sources.source import Models, Source
from .verify import Reference, check_component, reference

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Their versions affect the graph."""


@dataclass(frozen=True)
class GraphFormat:
    """How graphs are traced: "fp32", "fp16" or "bf16", and the version of ONNX's operators."""

    precision: str
    opset: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Exporter:
    """Makes the graph of one component of a source."""

    source: Source
    component: Component
    recipe: Recipe
    form: GraphFormat

    def fingerprint(self) -> str:
        """A hash of everything that determines the graph: weights, contract, precision, our tracing code, the
        libraries."""
        code = sorted(Path(__file__).with_name("graphs").glob("*.py"))
        parts = [
            self.source.fingerprint(self.recipe.part),
            repr(self.component),
            repr(self.form),
            str(self.recipe.fuses),
            self._module_class.__qualname__,
            *(sha256(file) for file in (*code, Path(inspect.getfile(self._module_class)))),
            *(f"{name} {version(name)}" for name in LIBRARIES),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def _module_class(self) -> Any:
        return self.recipe.module

    def reference(self, models: Models) -> Reference:
        """The outputs of torch for random inputs, in float32, with the weights rounded to the graph's precision. The
        model keeps the rounded weights."""
        model = models(self.recipe.part)
        round_weights(model, self.form.dtype)
        return reference(self.component, self.recipe.module(model, torch.float32), self.source.sizes())

    def export(self, models: Models, folder: Path, label: str, report: Report) -> Graph:
        """Traces the component into the bundle in `folder`; with the text encoder go the vectors of its tokens. The
        model is in the graph's precision afterwards."""
        started, file = perf_counter(), folder / graph_file(self.component.name)
        fused = self.recipe.fuses_attention(self.form.precision, self.form.opset)
        model = models(self.recipe.part)
        names = parameter_names(model)
        module = self.recipe.module(model, self.form.dtype, fused)
        count = sum(parameter.numel() for parameter in module.parameters())
        require_disk(folder, count * self.form.dtype.itemsize)
        report(f"{label}: tracing {count / 1e6:.1f} M parameters in {self.form.precision}")
        export_onnx(self.component, module, self.source.sizes(), file, self.form.opset)
        if self.component.adapted:
            write_table(file, module, names)
        if self.component.name == "text_encoder":
            table = token_table(model)
            np.save(folder / TOKEN_TABLE, (table.float() if table.dtype == torch.bfloat16 else table).numpy())
        return Graph(
            graph_file(self.component.name),
            self.form.opset,
            int(onnx.load(str(file), load_external_data=False).ir_version),
            {"export": round(perf_counter() - started, 2)},
            self.fingerprint(),
        )

    def check(self, expected: Reference, folder: Path) -> Mapping[str, Any]:
        """The difference between the graph in `folder` and torch. VerificationError beyond the tolerance."""
        graphs = {self.component.name: folder / graph_file(self.component.name)}
        backend = OnnxRuntimeBackend(graphs, family=self.source.family)
        return as_json(check_component(self.component, backend, expected, self.form.precision))


def timed(graph: Graph, check: float) -> Graph:
    """The graph's entry with the seconds that comparing it took."""
    return replace(graph, seconds={**graph.seconds, "check": round(check, 2)})
