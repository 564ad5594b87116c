"""Train the class-conditional model on pixels from nothing and write it as a diffusers folder.

    python -m export.demo.train_shapes             # about 45 minutes of one CPU core; resumes where it was stopped

An Improved DDPM (arXiv 2102.09672): cosine schedule, learned variance, class labels. Same seed, same torch, same number
of threads: same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from .classes import CLASSES, INKS, SIZE, scene
from .judge import judge_class
from .pictures import SHAPES, coverage
from .training import Training, step_rng
from .variance import VLB_WEIGHT, HybridLoss

FOLDER = Path(__file__).parent / "shapes"
"""The model, as a diffusers folder."""

REPORT_EVERY = 250


@dataclass(frozen=True)
class Phase:
    """A part of the training with a learning rate schedule of its own.

    steps: of the schedule, of which only those before `until` are made. noisy: the share of timesteps that are drawn
    from the noisiest 45 % alone, where a picture's colours are decided. coarse: the weight of `coarse_error`. stage:
    keeps the random numbers of phases and of the other model's stages apart.
    """

    stage: int
    steps: int
    until: int
    rate: float
    backgrounds: tuple[str, ...]
    noisy: float
    coarse: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """The first phase teaches the shapes. But so small a U-Net misjudges the mean of the noise by half of what that
    varies, and where there is little but noise, this decides between black and white. The second phase's grey is the
    middle of a pixel's range, which the error moves less. The third one trains against that error."""

    seed: int = 0
    placements: int = 512
    batch: int = 32
    phases: tuple[Phase, ...] = (
        Phase(4, 4500, 3600, 1.5e-3, ("black", "white"), 0.0),
        Phase(5, 600, 600, 1e-3, ("grey",), 0.3),
        Phase(6, 1800, 1800, 1.2e-3, ("grey",), 0.3, coarse=0.1),
    )


class Pictures:
    """Every shape's coverage masks at many places and sizes, to be coloured batch by batch."""

    def __init__(self, recipe: Recipe) -> None:
        rng = np.random.default_rng(recipe.seed)
        drawn = {
            shape: [coverage(scene(kind, rng), SIZE) for _ in range(recipe.placements)]
            for shape, kind in {kind.shape: kind for kind in CLASSES}.items()
        }
        self._masks = torch.from_numpy(np.stack([np.stack(drawn[shape]) for shape in SHAPES]))
        self._ink = _colours([kind.colour for kind in CLASSES])

    def draw(
        self, rng: np.random.Generator, count: int, backgrounds: tuple[str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [count, 3, 32, 32] in -1..1, and the labels [count] of their classes."""
        labels = rng.integers(len(CLASSES), size=count)
        shapes = torch.tensor([SHAPES.index(CLASSES[label].shape) for label in labels])
        masks = self._masks[shapes, torch.from_numpy(rng.integers(self._masks.shape[1], size=count))].unsqueeze(1)
        ground = _colours(backgrounds)[torch.from_numpy(rng.integers(len(backgrounds), size=count))]
        chosen = torch.from_numpy(labels)
        return masks * self._ink[chosen] + (1 - masks) * ground, chosen


def _colours(names: list[str] | tuple[str, ...]) -> torch.Tensor:
    """[len(names), 3, 1, 1] in -1..1."""
    rgb = torch.tensor([INKS[name] for name in names], dtype=torch.float32)
    return rgb.reshape(-1, 3, 1, 1) / 127.5 - 1


def new_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 48, 72),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        attention_head_dim=16,
        num_class_embeds=len(CLASSES),
        resnet_time_scale_shift="scale_shift",
    )


def new_scheduler() -> DDPMScheduler:
    """Improved DDPM's. diffusers' spacing, "leading", begins a step below the noisiest timestep, where predicting
    the mean matters most."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True)


def train(recipe: Recipe, work: Path) -> UNet2DModel:
    """The trained U-Net, with averaged weights."""
    torch.manual_seed(recipe.seed)
    unet, pictures, objective = new_unet(), Pictures(recipe), HybridLoss(new_scheduler().betas)
    for number, phase in enumerate(recipe.phases, start=1):
        _run(recipe, phase, f"phase {number}", unet, pictures, objective, work / f"shapes-{number}.pt")
    return unet.eval()


def _run(
    recipe: Recipe, phase: Phase, name: str, unet: UNet2DModel, pictures: Pictures, objective: HybridLoss, file: Path
) -> None:
    training = Training(unet, phase.rate, phase.steps, file)
    losses: list[tuple[float, float]] = []
    for step in training.remaining(name, phase.until):
        rng = step_rng(recipe.seed, phase.stage, step)
        clean, labels = pictures.draw(rng, recipe.batch, phase.backgrounds)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (recipe.batch,))
        if phase.noisy:
            chosen = torch.from_numpy(rng.random(recipe.batch)) < phase.noisy
            timesteps = torch.where(chosen, torch.randint(550, 1000, (recipe.batch,)), timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(objective.noisy(clean, noise, timesteps), timesteps, class_labels=labels).sample
        simple, bound = objective(output.float(), noise, timesteps)
        loss = simple + VLB_WEIGHT * bound
        if phase.coarse:
            loss = loss + phase.coarse * coarse_error(output.float()[:, :3] - noise)
        training.update(loss)
        losses.append((simple.item(), bound.item()))
        if training.done % REPORT_EVERY == 0:
            means = np.mean(losses[-REPORT_EVERY:], axis=0)
            print(f"{name}, step {training.done}: L_simple {means[0]:.4f}, L_vlb {means[1]:.2f} bits", flush=True)


def coarse_error(error: torch.Tensor) -> torch.Tensor:
    """What the squared error [B, C, H, W] of predicted noise is in its means over 8 x 8 pixels and over all, in units
    of those means' own variance. They decide over colours, and in the mean over pixels they count next to nothing. The
    prediction that minimises this is the same as without it."""
    return sum(F.avg_pool2d(error, side).square().mean() * side**2 for side in (8, SIZE))  # type: ignore[return-value]


@torch.no_grad()
def make(
    unet: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler, labels: list[int], steps: int, seed: int = 0
) -> np.ndarray:
    """A picture of each label, [len(labels), 32, 32, 3] uint8, with diffusers' scheduler."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator)
    for t in scheduler.timesteps:
        output = unet(x, t, class_labels=torch.tensor(labels)).sample
        if isinstance(scheduler, DDIMScheduler):
            output = output[:, :3]  # DDIM has no use for the variance
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    pixels: np.ndarray = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def share_right(unet: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler, each: int, steps: int) -> float:
    """The share of pictures, `each` of every class, that are what their class says."""
    labels = list(range(len(CLASSES))) * each
    pictures = make(unet, scheduler, labels, steps)
    return float(np.mean([judge_class(image).agrees(CLASSES[label]) for label, image in zip(labels, pictures)]))


def write_model(folder: Path, unet: UNet2DModel) -> None:
    """The diffusers folder, safetensors in fp16, in place of what was there; classes.json names the labels."""
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    DDPMPipeline(unet.to(torch.float16), new_scheduler()).save_pretrained(unfinished, safe_serialization=True)
    (unfinished / "classes.json").write_text(json.dumps([str(kind) for kind in CLASSES], indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the class-conditional model on pixels from nothing.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/shapes-training"), help="where the checkpoint is kept")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    unet = train(Recipe(seed=options.seed), options.work)
    for scheduler in (new_scheduler(), DDIMScheduler.from_config(new_scheduler().config)):
        share = share_right(unet, scheduler, each=10, steps=50)
        print(f"{type(scheduler).__name__}, 50 steps: {share:.1%} of {10 * len(CLASSES)} pictures are right")
    write_model(options.output, unet)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
