"""Attention of models with scores beyond half precision (`upcast_attention`, SD 2.1), in graphs in half precision."""

import functools

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.family import STABLE_DIFFUSION
from export.compare import COMPONENT_TOLERANCE, difference, random_inputs
from export.graphs import attention as graphs
from export.graphs.attention import PlainAttention, bounded_scores, centred
from export.graphs.denoiser import Denoiser
from export.graphs.precision import round_weights
from tests.fakes.tensorrt_plan import read_graph
from tests.models import SHALLOW_UNET
from tests.traces import shared_export


def as_they_are(unet):
    """Scores up to 2."""


def with_much_in_common(unet):
    """A channel of the tokens that is the same for all of them gives queries and keys one large vector; the rest of the
    keys is orthogonal to it. Scores of 1e5 that differ by a few."""
    for block in (module for module in unet.modules() if hasattr(module, "attn1")):
        block.norm1.weight[0], block.norm1.bias[0] = 0.0, 3.0
        attention = block.attn1
        sign = torch.randn(attention.to_q.out_features, generator=torch.Generator().manual_seed(1)).sign()
        for head in attention.to_k.weight.unflatten(0, (attention.heads, -1)):  # views
            direction = sign[: len(head), None] / len(head) ** 0.5
            head -= direction @ (direction.T @ head)
        common = sign[: attention.to_q.out_features // attention.heads].repeat(attention.heads)
        attention.to_q.weight[:, 0], attention.to_k.weight[:, 0] = 50 * common, 50 * common


def spread_out(unet):
    """Scores of up to 2e6 that have nothing in common: each query looks at one key."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.to_q.weight *= 1000
            module.to_k.weight *= 1000


def changed_unet(change):
    """A U-Net of the SD 2.x kind with weights that half precision can hold."""
    torch.manual_seed(0)
    options = {"use_linear_projection": True, "upcast_attention": True}
    unet = UNet2DConditionModel(**SHALLOW_UNET, attention_head_dim=2, **options).eval()
    with torch.no_grad():
        change(unet)
    round_weights(unet, torch.float16)
    return unet


def float_scores(run):
    """What `run` gives with scores from a product in float32 of queries and keys in half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "centred", lambda tokens: tokens)
        patch.setattr(graphs, "bounded_scores", lambda query, key: query.float() @ key.float().transpose(-1, -2))
        return run()


DENOISER, SIZES = STABLE_DIFFUSION["denoiser"], {"context_size": 32}
INPUTS = random_inputs(DENOISER, {"batch": 1, "rows": 2, "tokens": 77, "height": 8, "width": 12, **SIZES})


@functools.cache
def guided(change, dtype, way="ours"):
    """The denoiser's guided output in torch. `way` is "ours", "plain" without upcast_attention, or "float scores" as it
    was."""
    unet = changed_unet(change)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.upcast_attention = way != "plain"

    def output():
        with torch.no_grad():
            return Denoiser(unet, dtype)(**{name: torch.from_numpy(value) for name, value in INPUTS.items()})[
                :, 0
            ].numpy()

    return float_scores(output) if way == "float scores" else output()


def distance(change, way="ours"):
    """How far half precision is from float32, as relative RMS."""
    return difference(guided(change, torch.float16, way), guided(change, torch.float32)).relative_rms


@pytest.mark.parametrize("change", [as_they_are, with_much_in_common])
def test_scores_in_half_precision_give_what_float32_gives(change):
    assert distance(change) < COMPONENT_TOLERANCE["fp16"]
    assert np.isfinite(guided(change, torch.float16, "plain")).all() == (change is as_they_are)


def test_what_all_keys_have_in_common_costs_no_digits():
    """Scores in float32 are no help where the keys themselves are rounded to half."""
    assert 10 * distance(with_much_in_common) < distance(with_much_in_common, "float scores")


def test_scores_that_are_far_apart_stay_finite():
    assert not np.isfinite(guided(spread_out, torch.float16, "plain")).any()
    assert np.isfinite(guided(spread_out, torch.float16)).all()


@pytest.mark.parametrize("size", [1, 3, 10, 30, 100, 300])
def test_a_product_in_half_costs_what_it_costs_models_that_do_not_overflow(size):
    """One attention whose scores spread by `size` squared: about twice the error of float32 scores (three times at
    most), and that of the plain product, as long as this does not overflow. Which key wins is a matter of the last
    digits of queries and keys then, in float32 too."""
    torch.manual_seed(0)
    attention = Attention(256, heads=8, dim_head=64, processor=PlainAttention(False)).requires_grad_(False)
    attention.to_q.weight.normal_(std=size / 16)
    attention.to_k.weight.normal_(std=size / 16)
    tokens = torch.randn(1, 512, 256).half()
    exact = attention.half().double()(tokens.double())  # weights rounded to half
    attention.half()
    plain = attention(tokens)
    attention.upcast_attention = True
    ours = attention(tokens)
    floats = float_scores(lambda: attention(tokens))
    plain, ours, floats = (
        difference(value.double().numpy(), exact.numpy()).relative_rms for value in (plain, ours, floats)
    )
    assert ours < 3 * floats
    assert np.isnan(plain) if size == 300 else ours < 1.6 * plain


@pytest.mark.slow
def test_the_graph_does_the_same_and_every_tensorrt_reads_it(tmp_path):
    file = tmp_path / "denoiser.onnx"
    shared_export(DENOISER, Denoiser(changed_unet(with_much_in_common), torch.float16), SIZES, file)
    (output,) = OnnxRuntimeBackend({"denoiser": file}).run("denoiser", INPUTS)
    assert (
        difference(output[:, 0], guided(with_much_in_common, torch.float32)).relative_rms < COMPONENT_TOLERANCE["fp16"]
    )
    graph = read_graph(file, None, "8")
    products = [
        node
        for node in graph.nodes
        if node.operator == "MatMul" and {graph.tensors[name].dtype for name in node.outputs} == {"FLOAT"}
    ]
    assert len(products) == 2  # guidance and sampler; scores in float32 would be more


@pytest.mark.parametrize("size", [1e-6, 1.0, 100.0, 6e4])
def test_no_product_overflows_whatever_the_values(size):
    """Also where query and key point the same way, and for a query of zeros."""
    query = torch.full((1, 1, 3, 64), size).half()
    query[0, 0, 0] = 0
    key = torch.stack(
        [query[0, 0, 1], -query[0, 0, 1], torch.randn(64, generator=torch.Generator().manual_seed(0)).half()]
    )[None, None]
    ours, exact = bounded_scores(query, key).double(), query.double() @ key.double().transpose(-1, -2)
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().max() <= 2e-3 * max(float(exact.abs().max()), 1e-6)


def test_centred_tokens_have_no_mean():
    tokens = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)).half() + 100
    assert centred(tokens).dtype == torch.float16
    assert centred(tokens).float().mean(dim=1).abs().max() < 1e-3
