"""The second built-in model, on pixels, draws the class that it is asked for, with diffusers and with our runtime."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from engine import Pipeline
from export.build import build, shapes_of
from export.demo import class_sheet, train_shapes
from export.demo.classes import CLASSES, example
from export.demo.judge import judge_class
from export.demo.variance import HybridLoss
from export.sources.checkpoint import resolve

from .conftest import ENGINES

LABELS = list(range(len(CLASSES)))


def share_right(labels, pictures) -> float:
    return float(np.mean([judge_class(picture).agrees(CLASSES[label]) for label, picture in zip(labels, pictures)]))


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.slow
def test_diffusers_draws_every_class():
    pipeline = DDPMPipeline.from_pretrained(train_shapes.FOLDER)
    assert share_right(LABELS, train_shapes.make(pipeline.unet, pipeline.scheduler, LABELS, steps=25)) >= 0.95


@pytest.mark.slow
def test_ours_draws_every_class():
    source = resolve("shapes")
    folder = build(source, ENGINES, "fp32", shapes_of(source)).folder
    with Pipeline.load(folder, backend="onnxruntime") as pipeline:
        pictures = class_sheet.make(pipeline, LABELS, steps=25)
    assert share_right(LABELS, pictures) >= 0.95


def test_the_model_is_small_and_says_what_it_is():
    files = [file for file in train_shapes.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 2_500_000
    weights = load_file(train_shapes.FOLDER / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert json.loads((train_shapes.FOLDER / "classes.json").read_text()) == [str(kind) for kind in CLASSES]
    unet = UNet2DModel.load_config(train_shapes.FOLDER / "unet")
    assert (unet["num_class_embeds"], unet["out_channels"]) == (len(CLASSES), 6)
    scheduler = DDPMScheduler.load_config(train_shapes.FOLDER / "scheduler")
    assert (scheduler["variance_type"], scheduler["beta_schedule"]) == ("learned_range", "squaredcos_cap_v2")


# ---------------------------------------------------------------------------------------------------- the judge


def test_the_judge_knows_every_drawn_class():
    rng = np.random.default_rng(0)
    for label, kind in list(enumerate(CLASSES)) * 4:
        verdict = judge_class(example(label, rng))
        assert verdict.agrees(kind), (kind, verdict)
        assert not any(verdict.agrees(other) for other in CLASSES if other != kind)


def test_the_judge_overlooks_faint_noise():
    rng = np.random.default_rng(0)
    noisy = [np.clip(example(i, rng) + rng.normal(0, 6, (32, 32, 3)), 0, 255).astype(np.uint8) for i in LABELS]
    assert share_right(LABELS, noisy) == 1.0


@pytest.mark.parametrize("picture", ["noise", "plain", "tinted background", "light background", "half a shape"])
def test_the_judge_rejects_what_is_wrong(picture):
    rng = np.random.default_rng(0)
    drawn = example(0, rng)
    half = drawn.copy()
    half[:, 16:] = half[0, 0]
    wrong = {
        "noise": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "plain": np.full((32, 32, 3), 128, np.uint8),
        "tinted background": np.where(drawn == drawn[0, 0], [200, 128, 128], drawn).astype(np.uint8),
        "light background": np.where(drawn == drawn[0, 0], 170, drawn).astype(np.uint8),
        "half a shape": half,
    }[picture]
    assert not judge_class(wrong).agrees(CLASSES[0])


def test_the_judge_refuses_other_sizes():
    with pytest.raises(ValueError, match="32 x 32 pixels, not \\(64, 64, 3\\)"):
        judge_class(np.zeros((64, 64, 3), np.uint8))


# ---------------------------------------------------------------------------------------------------- the training


def hybrid(fraction: float, error: float, timestep: int, betas: torch.Tensor) -> tuple[float, float]:
    """The two losses of a U-Net whose noise is off by `error`, and whose variance lies at `fraction`."""
    noise = torch.zeros(1, 1, 1, 1)
    output = torch.cat([noise + error, noise + 2 * fraction - 1], dim=1)
    simple, bound = HybridLoss(betas)(output, noise, torch.tensor([timestep]))
    return float(simple), float(bound)


def test_the_bound_is_the_divergence_of_the_two_normal_distributions():
    """From equations 10, 11, 12 and 15 of arXiv 2102.09672, for a clean picture of 0."""
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.double()
    t, fraction, error = 10, 0.3, 0.1
    alphas = torch.cumprod(1 - betas, 0)
    true_variance = betas[t] * (1 - alphas[t - 1]) / (1 - alphas[t])
    variance = betas[t] ** fraction * true_variance ** (1 - fraction)
    mean_error = betas[t] / (1 - alphas[t]).sqrt() / (1 - betas[t]).sqrt() * error
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), true_variance.sqrt()),
        torch.distributions.Normal(mean_error, variance.sqrt()),
    )
    simple, bound = hybrid(fraction, error, t, betas)
    assert simple == pytest.approx(error**2)
    assert bound == pytest.approx(1000 * float(wanted) / np.log(2), rel=1e-3)


def test_the_last_step_is_surprised_by_the_pixels_bin():
    betas = torch.linspace(1e-4, 0.02, 1000)
    _, bound = hybrid(1.0, 0.0, 0, betas)
    normal = torch.distributions.Normal(0.0, float(betas[0]) ** 0.5)
    inside = normal.cdf(torch.tensor(1 / 255)) - normal.cdf(torch.tensor(-1 / 255))
    assert bound == pytest.approx(-1000 * float(inside.log2()), rel=1e-4)


def test_the_bound_does_not_move_the_noise():
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    _, bound = HybridLoss(torch.linspace(1e-4, 0.02, 1000))(output, torch.randn(2, 3, 4, 4), torch.tensor([0, 500]))
    bound.backward()
    assert output.grad[:, :3].abs().max() == 0
    assert output.grad[:, 3:].abs().min() > 0


def test_training_starts_and_resumes(tmp_path):
    phases = (
        train_shapes.Phase(4, 4, 2, 1e-3, ("black", "white"), 0.0),
        train_shapes.Phase(5, 2, 2, 1e-3, ("grey",), 0.5),
    )
    recipe = train_shapes.Recipe(placements=2, batch=2, phases=phases)
    first = train_shapes.train(recipe, tmp_path).state_dict()
    again = train_shapes.train(recipe, tmp_path).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    unet = train_shapes.new_unet()
    unet.load_state_dict(first)
    train_shapes.write_model(tmp_path / "model", unet)
    assert DDPMPipeline.from_pretrained(tmp_path / "model").unet.config.num_class_embeds == len(CLASSES)
