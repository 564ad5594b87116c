"""What exporter and runtime agree on about graphs: tensors, components, families, and the sizes that they serve.

A `Family` (family.py) lists its components and their tensors. Everything that handles a graph's inputs or outputs reads
them there: tracing, checks, OpenVINO's parts, TensorRT's profiles and the layout of a step's row, counters, random
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SLOTS = 5
"""K: how many latent-sized tensors a sampler may remember. Slot 0 is the latent itself, scaled to unit variance (VP).
The Runge-Kutta warm-up of PNDM needs four more."""

PROMPT_TOKENS = 77
MAX_STEPS = 1000

DYNAMIC = ("batch", "rows", "tokens", "height", "width")
"""The dimensions that a call chooses. Height and width are those of the latents. Other names are the model's sizes."""

JOINS = {1: "depth", 3: "low_resolution", 4: "image", 5: "mask"}
"""What a U-Net sees beside the latents, by the number of channels that are joined to these: a depth map, a small noised
picture, the latents of a picture (InstructPix2Pix), or a mask and the latents of what it leaves of a picture."""

Sizes = Mapping[str, int]
"""The size of each named dimension."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    dims: sizes, names of dimensions, or multiples of one, such as "8*height". The first one is "batch" for a tensor
    with a value for each sample, and "rows" for one with a value for each row of the U-Net (with guidance a sample has
    two).
    changes: how often an input gets a new value: with each "step", once a "loop", or "never" while pictures join and
    leave.
    below: integers are below this number, or index the dimension of this name; real numbers are spread over 0 to it.
    None stands for standard normal values.
    default: what every element is where a job has no value of its own; None if a job must have one.
    solver: guidance and the sampler read it, not the U-Net. exact: what follows from it alone is computed in float32,
    whatever the model's precision is. fed_by: the component's output that becomes this input in the next step.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "float32"
    changes: Literal["never", "loop", "step"] = "loop"
    below: int | str | None = None
    default: float | None = None
    solver: bool = False
    exact: bool = False
    fed_by: str | None = None

    def shape(self, sizes: Sizes) -> Shape:
        """Its shape for these sizes of the dimensions. KeyError for one that is missing."""
        return tuple(_size(dim, sizes) for dim in self.dims)

    @property
    def names(self) -> frozenset[str]:
        """The names of its dimensions."""
        return frozenset(_name(dim) for dim in self.dims if isinstance(dim, str))

    @property
    def dynamic(self) -> dict[int, str]:
        """The axes whose size a call chooses, with the names of their dimensions."""
        return {axis: dim for axis, dim in enumerate(self.dims) if isinstance(dim, str) and _name(dim) in DYNAMIC}

    @property
    def indexes(self) -> str | None:
        """The dimension that its values are indices of, or None."""
        return self.below if isinstance(self.below, str) else None


@dataclass(frozen=True)
class Component:
    """A graph. `required`: every picture needs it. `halves`: a CPU may run it in bfloat16, if the builder has measured
    that pictures stay right. `adapted`: what files of adapters such as LoRA call it; None if they don't change it."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    required: bool = True
    halves: bool = True
    adapted: str | None = None

    def input(self, name: str) -> Tensor:
        return next(tensor for tensor in self.inputs if tensor.name == name)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)

    @property
    def dimensions(self) -> frozenset[str]:
        """The names of its inputs' dimensions."""
        return frozenset().union(*(tensor.names for tensor in self.inputs))

    @property
    def state(self) -> Tensor:
        """The input that an output of the step before becomes."""
        return next(tensor for tensor in self.inputs if tensor.fed_by)

    @property
    def stepped(self) -> tuple[Tensor, ...]:
        """The inputs that get a new value with each step, except the state."""
        return tuple(tensor for tensor in self.inputs if tensor.changes == "step" and not tensor.fed_by)

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """The shape of each input for these sizes of the dimensions."""
        return {tensor.name: tensor.shape(sizes) for tensor in self.inputs}

    def sizes(self, shapes: Mapping[str, Sequence[int | None]]) -> dict[str, int]:
        """The sizes of dimensions that follow from these shapes of inputs. None and negative numbers in a shape stand
        for unknown sizes. ValueError if the shapes contradict the contract or each other."""
        found: dict[str, int] = {}
        for tensor in self.inputs:
            shape = shapes.get(tensor.name)
            if shape is None:
                continue
            if len(shape) != len(tensor.dims):
                raise ValueError(f"{tensor.name} has {len(shape)} dimensions instead of {len(tensor.dims)}")
            for dim, size in zip(tensor.dims, shape):
                if size is not None and size >= 0:
                    _note(found, dim, size, tensor.name)
        return found

    def model_sizes(self, shapes: Mapping[str, Sequence[int | None]]) -> dict[str, int]:
        """The sizes that are the model's, read off the shapes of a graph's inputs."""
        return {name: size for name, size in self.sizes(shapes).items() if name not in DYNAMIC}


@dataclass(frozen=True)
class Family:
    """A kind of model, and what its bundles hold.

    channels: of a latent; factor: pixels per latent element, in both directions; tokenizers: how many a text goes
    through, 0 for a model without texts; classes: how many its pictures are of, None for a model without classes;
    concat: the channels that are joined to each row of the U-Net; noise_levels: how many of these a U-Net that is told
    the noise of what is joined knows, None for others.
    """

    name: str
    components: tuple[Component, ...]
    channels: int
    factor: int
    tokenizers: int = 1
    classes: int | None = None
    concat: int = 0
    noise_levels: int | None = None

    def __getitem__(self, name: str) -> Component:
        """The component of that name. KeyError where there is none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(component.name for component in self.components)

    @property
    def most_rows(self) -> int:
        """The U-Net's rows for a picture: two where guidance has a negative text, three where one of them also sees no
        picture."""
        if self.joins == "image":
            return 3
        return 2 if self.tokenizers else 1

    @property
    def joins(self) -> str | None:
        """What the U-Net sees beside the latents, a value of JOINS; None for nothing."""
        return JOINS[self.concat] if self.concat else None

    @property
    def begins_with_noise(self) -> bool:
        """Whether a loop with an image begins with noise alone: the U-Net sees the image instead."""
        return self.joins in ("image", "low_resolution")

    @property
    def magnification(self) -> int:
        """How many times as high and wide as its image a picture is: the upscaler's image is as large as latents."""
        return self.factor if self.joins == "low_resolution" else 1

    @property
    def clips(self) -> bool:
        """Whether a sampler may keep the predicted sample within a range."""
        return "clip" in self["denoiser"].input_names

    @property
    def learned_variance(self) -> bool:
        """Whether the U-Net predicts the variance of a step too."""
        return "variance" in self["denoiser"].input_names

    @property
    def required(self) -> tuple[str, ...]:
        """The components that every picture needs."""
        return tuple(component.name for component in self.components if component.required)

    def plane(self, height: int, width: int) -> Shape:
        """The shape [C, h, w] of the latents of a picture of that many pixels."""
        return self.channels, height // self.factor, width // self.factor


@dataclass(frozen=True)
class Range:
    """Sizes that a bundle was built for, ends included. `opt` is the one that it is fastest at."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a range is MIN <= OPT <= MAX from 1 up, not {self.min}:{self.opt}:{self.max}")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.static else f"{self.min}:{self.opt}:{self.max}"

    @property
    def static(self) -> bool:
        return self.min == self.max


@dataclass(frozen=True)
class Shapes:
    """Height and width in pixels and the number of pictures in a call that a bundle or a plan serves. `rows` are the
    U-Net's rows in a call: with guidance twice the pictures. `chunks` are the texts' tokens in a call, in chunks of 77.
    None means that every number is served."""

    height: Range
    width: Range
    batch: Range
    rows: Range | None = None
    chunks: Range | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", {self.rows} U-Net rows"
        chunks = "" if self.chunks is None or self.chunks.max == 1 else f", {self.chunks} chunks of a prompt"
        return f"{self.height} x {self.width}, batch {self.batch}{rows}{chunks}"

    def allows(self, height: int, width: int, batch: int, rows: int) -> bool:
        """Whether one call of these sizes is served."""
        sides = height in self.height and width in self.width
        return sides and batch in self.batch and (self.rows is None or rows in self.rows)

    def tokens(self, needed: int) -> int | None:
        """The fewest tokens of a call that are served and a multiple of these. None if there are none."""
        if self.chunks is None:
            return needed
        least = -(-PROMPT_TOKENS * self.chunks.min // needed) * needed
        return least if least <= PROMPT_TOKENS * self.chunks.max else None

    def static(self, factor: int) -> dict[str, int]:
        """The graphs' dimensions that are the same in every call, by name, for a family with that factor."""
        sizes = {"height": (self.height, factor), "width": (self.width, factor), "batch": (self.batch, 1)}
        return {name: side.opt // unit for name, (side, unit) in sizes.items() if side.static}

    def sizes(self, factor: int, which: Literal["min", "opt", "max"] = "opt") -> dict[str, int]:
        """The sizes of a call at this end of the ranges, for a family with that factor. If every number of rows is
        served, `rows` are those with guidance."""
        height, width, batch = (int(getattr(side, which)) for side in (self.height, self.width, self.batch))
        rows = 2 * batch if self.rows is None else int(getattr(self.rows, which))
        chunks = 1 if self.chunks is None else int(getattr(self.chunks, which))
        return {
            "batch": batch,
            "rows": rows,
            "tokens": PROMPT_TOKENS * chunks,
            "height": height // factor,
            "width": width // factor,
        }


def _name(dim: str) -> str:
    return dim.rpartition("*")[2]


def _factor(dim: str) -> int:
    return int(dim.rpartition("*")[0] or 1)


def _size(dim: int | str, sizes: Sizes) -> int:
    return dim if isinstance(dim, int) else _factor(dim) * sizes[_name(dim)]


def _note(found: dict[str, int], dim: int | str, size: int, tensor: str) -> None:
    """Adds the size that follows from one dimension of a shape. ValueError if it contradicts a known one."""
    factor, name = (1, None) if isinstance(dim, int) else (_factor(dim), _name(dim))
    known = dim if name is None else found.get(name)
    if size % factor or (known is not None and known != size // factor):
        raise ValueError(
            f"{tensor} has {size} where {dim} is {known if known is not None else f'a multiple of {factor}'}"
        )
    if name is not None:
        found[name] = size // factor
