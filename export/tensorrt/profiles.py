"""Which sizes a plan is built for, and how TensorRT is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from engine.backends.tensorrt import versions as versions
from engine.contract import Component, Family, Range, Shapes, Sizes

from ..compare import random_inputs

PIXELS_PER_DECODE = 1024 * 1024
"""Pictures that the VAE takes together: so many pixels, or one picture. More would cost memory and save no time."""

ONE = Range(1, 1, 1)


def with_rows(shapes: Shapes, most_rows: int = 2) -> list[Shapes]:
    """Profiles for the U-Net's rows with and without guidance: two for a fixed number of pictures, since fixed sizes
    are the fastest, one for a range. `most_rows` are the family's for a picture: a model without texts has one,
    InstructPix2Pix three."""
    batch = shapes.batch
    if most_rows == 1:
        return [Shapes(shapes.height, shapes.width, batch, batch)]
    fixed, ranged = (
        [Range(n, n, n) for n in (most_rows * batch.opt, batch.opt)],
        [Range(batch.min, most_rows * batch.opt, most_rows * batch.max)],
    )
    rows = fixed if batch.static else ranged
    return [Shapes(shapes.height, shapes.width, batch, one) for one in rows]


def component_profiles(component: Component, profiles: Sequence[Shapes]) -> list[Shapes]:
    """The profiles of a component, without doublets. One that takes rows alone takes 1 text up to all prompts and
    negative prompts; one that takes pictures alone as many as `PIXELS_PER_DECODE` allows together."""
    if component.dimensions >= {"batch", "rows"}:
        return list(profiles)
    if "rows" in component.dimensions:
        most = max(profile.batch.max for profile in profiles)
        return [Shapes(ONE, ONE, ONE, Range(1, 2 * profiles[0].batch.opt, 2 * most))]
    return list(dict.fromkeys(_pictures(profile) for profile in profiles))


def _pictures(profile: Shapes) -> Shapes:
    most = max(1, PIXELS_PER_DECODE // (profile.height.opt * profile.width.opt))
    batch = profile.batch
    fitting = Range(min(most, batch.min), min(most, batch.opt), min(most, batch.max))
    return Shapes(profile.height, profile.width, fitting, ONE)


def describe(component: Component, profile: Shapes) -> str:
    """What a component's profile serves, in words."""
    if "batch" not in component.dimensions:
        return f"{profile.rows} texts"
    if "rows" in component.dimensions:
        return str(profile)
    return f"{profile.height} x {profile.width}, batch {profile.batch}"


def profile_inputs(family: Family, component: Component, profile: Shapes, model_sizes: Sizes) -> dict[str, np.ndarray]:
    """Random inputs of the size that a profile is best at."""
    return random_inputs(component, {**profile.sizes(family.factor), **model_sizes})


def set_profiles(
    builder: Any,
    network: Any,
    config: Any,
    family: Family,
    component: Component,
    profiles: Sequence[Shapes],
    fail: Callable[[str], Exception],
) -> Sizes:
    """Tells the builder the sizes. A dimension that is the same everywhere is fixed in the network itself, which makes
    a faster plan than a profile whose minimum is its maximum. Returns the sizes that are the model's."""
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if set(inputs) != set(component.input_names):
        raise fail(f"found the inputs {sorted(inputs)} instead of {sorted(component.input_names)}")
    model_sizes = component.model_sizes({name: tuple(tensor.shape) for name, tensor in inputs.items()})
    ends: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")
    limits = [
        [component.shapes({**profile.sizes(family.factor, end), **model_sizes}) for end in ends] for profile in profiles
    ]
    for name, tensor in inputs.items():
        sizes = [set(values) for values in zip(*(shapes[name] for profile in limits for shapes in profile))]
        tensor.shape = tuple(values.pop() if len(values) == 1 else -1 for values in sizes)
    for profile in limits:
        added = builder.create_optimization_profile()
        accepted = all(
            versions.accepted(added.set_shape, name, *(shapes[name] for shapes in profile)) for name in inputs
        )
        if not accepted or config.add_optimization_profile(added) < 0:
            raise fail(f"refused the profile {profile}")
    return model_sizes
