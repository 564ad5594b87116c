"""Replaces the denoiser's graph in a bundle by one with a single change, which benchmarks.gpu --profile measures. Needs
torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from torch import Tensor, nn

from engine.bundle import sha256
from engine.contract import PROMPT_TOKENS
from engine.family import STABLE_DIFFUSION
from engine.manifest import File, Manifest, component_files, read, write
from export.component import Exporter, GraphFormat
from export.graphs import attention, precision
from export.graphs.recipes import RECIPES
from export.libraries import quiet_libraries
from export.sources.checkpoint import resolve
from export.sources.source import Models, Source


def write_denoiser(source: Source, bundle: Path, graph: str, opset: int) -> None:
    """Puts the changed graph into the bundle."""
    file = bundle / "onnx" / "denoiser.onnx"
    if graph == "softmax_in_half":
        model = onnx.load(str(file), load_external_data=False)
        soften(model.graph)
        onnx.save(model, str(file))
    else:
        models, form = Models(source), GraphFormat("fp16", opset)
        with GRAPHS[graph](models("unet")):
            file.with_name(f"{file.name}.data").unlink()
            exporter = Exporter(source, STABLE_DIFFUSION["denoiser"], RECIPES["denoiser"], form)
            exporter.export(models, bundle, graph, lambda message: None)
    manifest = Manifest.of(read(bundle))
    changed = replace(manifest.components["denoiser"], opset=opset, fingerprint=f"benchmarks.gpu_graphs {graph}")
    names = component_files("denoiser")
    files = {name: File(sha256(bundle / name), (bundle / name).stat().st_size) for name in names}
    write(
        bundle,
        replace(
            manifest,
            components={**manifest.components, "denoiser": changed},
            files={**manifest.files, **files},
        ),
    )


@contextmanager
def plain(unet: Any) -> Iterator[None]:
    """The graph without a change."""
    yield


@contextmanager
def norms_in_half(unet: Any) -> Iterator[None]:
    """Norms take and return half precision; TensorRT computes them in float32 inside."""
    with patch.object(precision, "Float32Norm", lambda norm: norm):
        yield


@contextmanager
def float_scores(unet: Any) -> Iterator[None]:
    """For models with upcast_attention: the product of queries and keys in float32."""
    with (
        patch.object(attention, "centred", lambda tokens: tokens),
        patch.object(attention, "bounded_scores", lambda query, key: query.float() @ key.float().transpose(-1, -2)),
    ):
        yield


@contextmanager
def text_keys_once(unet: Any) -> Iterator[None]:
    """Keys and values of the text are constants, as if they came in as inputs."""
    for block in unet.modules():
        if hasattr(block, "attn2"):
            for name in ("to_k", "to_v"):
                setattr(block.attn2, name, FixedText(getattr(block.attn2, name)))
            block.attn2.upcast_attention = False  # keys that have come from elsewhere are small already
    yield


class FixedText(nn.Module):
    """Gives random numbers of the right size. The text's part in them is 0, but keeps it an input of the graph."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.value = nn.Parameter(
            torch.randn(1, PROMPT_TOKENS, linear.out_features, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, text: Tensor) -> Tensor:
        return self.value + text[:, :1, :1] * 0.0


@contextmanager
def one_time_projection(unet: Any) -> Iterator[None]:
    """The projections of the timestep in all residual blocks are one product."""
    blocks = [block for block in unet.modules() if isinstance(getattr(block, "time_emb_proj", None), nn.Linear)]
    linears = [block.time_emb_proj for block in blocks]
    whole = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    whole.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]))
    whole.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]))
    made: list[tuple[Tensor, ...]] = []
    for i, block in enumerate(blocks):
        block.time_emb_proj = ProjectionPart(whole, [linear.out_features for linear in linears], i, made)
    yield


class ProjectionPart(nn.Module):
    """One block's part of the product, which the first block makes."""

    def __init__(self, whole: nn.Linear, sizes: list[int], index: int, made: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.whole, self._sizes, self._index, self._made = whole, sizes, index, made

    def forward(self, embedding: Tensor) -> Tensor:
        if self._index == 0:
            self._made[:] = [self.whole(embedding).split(self._sizes, dim=-1)]
        return self._made[0][self._index]


def soften(graph: onnx.GraphProto) -> None:
    """Takes the casts around every softmax away, so that it takes and gives half."""
    makers = {name: node for node in graph.node for name in node.output}
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        before, after = makers.get(softmax.input[0]), [node for node in graph.node if softmax.output[0] in node.input]
        if before is not None and before.op_type == "Cast" and len(after) == 1 and after[0].op_type == "Cast":
            softmax.input[0] = before.input[0]
            for node in (before, after[0]):
                graph.node.remove(node)
            softmax.output[0] = after[0].output[0]
    del graph.value_info[:]  # it tells the old types


GRAPHS: dict[str, Callable[[Any], Any]] = {
    "plain": plain,
    "softmax_in_half": plain,
    "norms_in_half": norms_in_half,
    "float_scores": float_scores,
    "text_keys_once": text_keys_once,
    "one_time_projection": one_time_projection,
}


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_graphs")
    p.add_argument(
        "--model", default="", help="a known architecture, with random weights; nothing is the built-in model"
    )
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--graph", choices=GRAPHS, default="plain")
    p.add_argument("--opset", type=int, default=18)
    o = p.parse_args()
    quiet_libraries()
    write_denoiser(resolve(o.model or None, bool(o.model)), o.bundle, o.graph, o.opset)


if __name__ == "__main__":
    main()
