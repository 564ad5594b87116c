"""The denoiser's graph with one change, in place of the one in a bundle: what benchmarks.gpu --profile measures. Needs
torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from torch import Tensor, nn

from engine.bundle import MANIFEST, sha256
from engine.contract import PROMPT_TOKENS
from export.build import modules
from export.graphs import modules as graphs
from export.graphs.tracing import example, export_onnx, fuses_attention
from export.libraries import quiet_libraries
from export.sources.checkpoint import Source, resolve


def write_denoiser(source: Source, bundle: Path, graph: str, opset: int) -> None:
    """Puts the changed graph into the bundle."""
    file = bundle / "onnx" / "denoiser.onnx"
    if graph == "softmax_in_half":
        model = onnx.load(str(file), load_external_data=False)
        soften(model.graph)
        onnx.save(model, str(file))
    else:
        kind, unet, channels = modules(source, "denoiser")
        with GRAPHS[graph](unet):
            module = kind(unet, torch.float16, fuses_attention("denoiser", "fp16", opset))
            file.with_name(f"{file.name}.data").unlink()
            export_onnx("denoiser", module, example("denoiser", channels), file, opset)
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in (f"onnx/{file.name}", f"onnx/{file.name}.data"):
        manifest["files"][name] = {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    manifest["components"]["denoiser"].update(opset=opset, fingerprint=f"benchmarks.gpu_graphs {graph}")
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@contextmanager
def plain(unet: Any) -> Iterator[None]:
    """As it is."""
    yield


@contextmanager
def norms_in_half(unet: Any) -> Iterator[None]:
    """Norms take half and give half; TensorRT computes them in float32 inside."""
    with patch.object(graphs, "Float32Norm", lambda norm: norm):
        yield


@contextmanager
def float_scores(unet: Any) -> Iterator[None]:
    """Of models with upcast_attention: a product in float32."""
    with (
        patch.object(graphs, "centred", lambda tokens: tokens),
        patch.object(graphs, "bounded_scores", lambda query, key: query.float() @ key.float().transpose(-1, -2)),
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
