"""Ask the built-in model for 96 scenes, judge every picture, and lay them out on one sheet.

python -m export.demo.contact_sheet --bundle engines/demo --output contact-sheet.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from engine import EngineError, Pipeline

from .judge import Verdict, judge, scenes_to_ask_for
from .pictures import SIZE, Scene, caption, held_out

COLUMNS = 16
BATCH = 8


def make(pipeline: Pipeline, scenes: list[Scene], steps: int = 20, guidance_scale: float = 3.0) -> list[np.ndarray]:
    """A picture [64, 64, 3] uint8 of each scene; picture i has seed i."""
    made: list[np.ndarray] = []
    for start in range(0, len(scenes), BATCH):
        some = scenes[start : start + BATCH]
        result = pipeline(
            [caption(scene) for scene in some],
            SIZE,
            SIZE,
            steps,
            guidance_scale,
            seed=list(range(start, start + len(some))),
            progress=False,
        )
        made += [np.asarray(image) for image in result.images]
    return made


def sheet(pictures: list[np.ndarray]) -> Image.Image:
    """Rows of 16 pictures."""
    rows = [np.concatenate(pictures[i : i + COLUMNS], axis=1) for i in range(0, len(pictures), COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the built-in model on 96 prompts and draw a contact sheet.")
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"))
    parser.add_argument("--output", type=Path, default=Path("contact-sheet.png"))
    options = parser.parse_args()
    scenes = list(scenes_to_ask_for())
    with Pipeline.load(options.bundle) as pipeline:
        pictures = make(pipeline, scenes)
    verdicts: list[Verdict] = [judge(picture) for picture in pictures]
    for scene, verdict in zip(scenes, verdicts):
        if not verdict.agrees(scene):
            print(
                f"wrong: {caption(scene)!r} (overlap {verdict.overlap:.2f}) looks like {verdict.colour} "
                f"{verdict.shape} on {verdict.background}"
            )
    right = [verdict.agrees(scene) for scene, verdict in zip(scenes, verdicts)]
    unseen = [r for r, scene in zip(right, scenes) if scene.triple in held_out()]
    fully = sum(verdict.agrees_fully(scene) for scene, verdict in zip(scenes, verdicts))
    print(
        f"{sum(right)} of {len(right)} have the right shape, colour and background ({sum(unseen)} of {len(unseen)} "
        "that training never saw); "
        f"{fully} also size and position; mean overlap {np.mean([v.overlap for v in verdicts]):.3f}"
    )
    sheet(pictures).save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(str(error))
