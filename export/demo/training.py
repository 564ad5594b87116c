"""What the training scripts share: one module's run with its averages and its file, and a step's random numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

CHECKPOINT_EVERY = 200


class Training:
    """One module being trained: AdamW on a one-cycle schedule, averaged weights in the second half, a file to resume
    from."""

    def __init__(self, module: torch.nn.Module, rate: float, steps: int, file: Path) -> None:
        self.module, self.steps, self.file, self.done = module, steps, file, 0
        self.optimizer = torch.optim.AdamW(module.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=steps + 1, pct_start=0.05, final_div_factor=100
        )
        self.average = {name: value.clone() for name, value in module.state_dict().items()}
        if file.exists():
            kept = torch.load(file, weights_only=True)
            module.load_state_dict(kept["module"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.schedule.load_state_dict(kept["schedule"])
            self.average, self.done = kept["average"], kept["done"]

    def save(self) -> None:
        kept: dict[str, Any] = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
            "done": self.done,
        }
        unfinished = self.file.with_suffix(".tmp")
        torch.save(kept, unfinished)
        os.replace(unfinished, self.file)

    def remaining(self, label: str, until: int | None = None) -> Iterator[int]:
        """The numbers of the steps still to do, to the end of the schedule or `until` an earlier step; leaves the
        averaged weights in the module at the end."""
        end = until or self.steps
        bar = tqdm(range(self.done, end), desc=label, initial=self.done, total=end, mininterval=5)
        for step in bar:
            yield step
            if step % 20 == 0:
                bar.set_postfix(loss=f"{self.loss:.4f}")
        self.save()
        self.module.load_state_dict(self.average)

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.done += 1
        self.loss = loss.item()
        keep = 0.998 if self.done > self.steps // 2 else 0.0
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                self.average[name].copy_(value if keep == 0.0 else torch.lerp(value, self.average[name], keep))
        if self.done % CHECKPOINT_EVERY == 0:
            self.save()


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """Random numbers of one step, so that a resumed run sees what an uninterrupted one would have seen."""
    torch.manual_seed(seed * 1_000_003 + stage * 500_009 + step)
    return np.random.default_rng((seed, stage, step))
