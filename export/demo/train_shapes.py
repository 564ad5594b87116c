"""Train the class-conditional model on pixels from nothing and write it as a diffusers folder.

    python -m export.demo.train_shapes             # about 35 minutes on one CPU core; resumes where it was stopped

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
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from .classes import BACKGROUNDS, CLASSES, SIZE, scene
from .pictures import COLOURS, SHAPES, coverage
from .training import Training, step_rng
from .variance import VLB_WEIGHT, HybridLoss

STAGE = 4
"""Keeps the random numbers apart from those of the first model's stages."""

REPORT_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    placements: int = 512
    steps: int = 4500
    batch: int = 32
    rate: float = 1.5e-3


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
        self._grounds = _colours(BACKGROUNDS)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [count, 3, 32, 32] in -1..1, and the labels [count] of their classes."""
        labels = rng.integers(len(CLASSES), size=count)
        shapes = torch.tensor([SHAPES.index(CLASSES[label].shape) for label in labels])
        masks = self._masks[shapes, torch.from_numpy(rng.integers(self._masks.shape[1], size=count))].unsqueeze(1)
        ground = self._grounds[torch.from_numpy(rng.integers(len(BACKGROUNDS), size=count))]
        chosen = torch.from_numpy(labels)
        return masks * self._ink[chosen] + (1 - masks) * ground, chosen


def _colours(names: list[str] | tuple[str, ...]) -> torch.Tensor:
    """[len(names), 3, 1, 1] in -1..1."""
    rgb = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)
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
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True)


def train(recipe: Recipe, work: Path) -> UNet2DModel:
    """The trained U-Net, with averaged weights."""
    torch.manual_seed(recipe.seed)
    unet, pictures, objective = new_unet(), Pictures(recipe), HybridLoss(new_scheduler().betas)
    training = Training(unet, recipe.rate, recipe.steps, work / "shapes.pt")
    losses: list[tuple[float, float]] = []
    for step in training.remaining("shapes"):
        clean, labels = pictures.draw(step_rng(recipe.seed, STAGE, step), recipe.batch)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (recipe.batch,))
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(objective.noisy(clean, noise, timesteps), timesteps, class_labels=labels).sample
        simple, bound = objective(output.float(), noise, timesteps)
        training.update(simple + VLB_WEIGHT * bound)
        losses.append((simple.item(), bound.item()))
        if training.done % REPORT_EVERY == 0:
            means = np.mean(losses[-REPORT_EVERY:], axis=0)
            print(f"step {training.done}: L_simple {means[0]:.4f}, L_vlb {means[1]:.2f} bits per dimension", flush=True)
    return unet.eval()


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
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "shapes", help="the diffusers folder to write"
    )
    parser.add_argument("--work", type=Path, default=Path("build/shapes-training"), help="where the checkpoint is kept")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    unet = train(Recipe(seed=options.seed, steps=options.steps), options.work)
    write_model(options.output, unet)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
