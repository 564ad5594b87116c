"""Ask the class-conditional model for every class, judge the pictures, and lay them out on one sheet.

python build_engines.py shapes
python -m export.demo.class_sheet --bundle engines/shapes --output class-sheet.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from engine import EngineError, Pipeline

from .classes import CLASSES, SIZE
from .judge import LEAST_OVERLAP, judge_class

BATCH = 8
ENLARGED = 2
"""Pixels of the sheet for a pixel of a picture."""


def make(
    pipeline: Pipeline, labels: list[int], steps: int = 50, scheduler: str | None = None, first_seed: int = 0
) -> list[np.ndarray]:
    """A picture [32, 32, 3] uint8 of each label; picture i has seed first_seed + i."""
    made: list[np.ndarray] = []
    for start in range(0, len(labels), BATCH):
        some = labels[start : start + BATCH]
        result = pipeline(
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            seed=[first_seed + start + i for i in range(len(some))],
            scheduler=scheduler,
            progress=False,
            class_labels=some,
        )
        made += [np.asarray(image) for image in result.images]
    return made


def sheet(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Rows of `columns` pictures with a thin line between them."""
    framed = [np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=128) for picture in pictures]
    rows = [np.concatenate(framed[i : i + columns], axis=1) for i in range(0, len(framed), columns)]
    image = Image.fromarray(np.concatenate(rows))
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the class-conditional model and draw a contact sheet by class.")
    parser.add_argument("--bundle", type=Path, default=Path("engines/shapes"))
    parser.add_argument("--output", type=Path, default=Path("class-sheet.png"))
    parser.add_argument("--each", type=int, default=10, help="pictures of each class")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", help="a sampler's name; the model's own is ddpm")
    options = parser.parse_args()
    labels = [label for each in range(options.each) for label in range(len(CLASSES))]
    with Pipeline.load(options.bundle) as pipeline:
        pictures = make(pipeline, labels, options.steps, options.scheduler)
    right = 0
    for number, (label, picture) in enumerate(zip(labels, pictures)):
        verdict = judge_class(picture)
        right += verdict.agrees(CLASSES[label])
        if not verdict.agrees(CLASSES[label]):
            print(
                f"wrong: {CLASSES[label]}, seed {number}, looks like {verdict.colour} {verdict.shape} on "
                f"{verdict.background} (overlap {verdict.overlap:.2f}, least {LEAST_OVERLAP})"
            )
    print(f"{right} of {len(labels)} are what their class says")
    sheet(pictures, len(CLASSES)).save(options.output)
    print(f"wrote {options.output}: a column for each class, {', '.join(map(str, CLASSES))}")


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(str(error))
