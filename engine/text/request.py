"""The texts of a call, checked: prompts in their syntax, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import checks
from ..contract import PROMPT_TOKENS
from ..errors import (
    AdapterTagError,
    ClipSkipError,
    EmbeddingsError,
    EmbeddingsWidthError,
    PromptError,
    PromptScheduleError,
    shown,
)
from .emphasis import EMPHASES, Emphasis, emphasis
from .prompt import Lora, Open, Prompt, lora, parse

LONGEST = 64 * PROMPT_TOKENS
"""The most tokens of embeddings that a call passes."""


@dataclass(frozen=True)
class Reads:
    """What a model's text encoder reads and gives: the width of an embedding, and the number of its layers."""

    width: int = 0
    layers: int = 0


NO_TEXTS = Reads()


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a call.

    prompts, negatives: as they were given, "" where embeddings are given instead; parsed, negative: the same in their
    syntax; skip, negative_skip: the text encoder's layers that are left out; embeds, negative_embeds: [prompts, T, C]
    float32, or None; loras: the adapters that the tags of the prompts name, by name.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    syntax: str = "plain"
    parsed: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()
    emphasis: Emphasis = EMPHASES["original"]
    skip: int = 0
    negative_skip: int = 0
    embeds: np.ndarray | None = None
    negative_embeds: np.ndarray | None = None
    loras: tuple[Lora, ...] = ()

    @classmethod
    def check(
        cls,
        reads: Reads,
        prompt: Any,
        negative_prompt: Any,
        prompt_syntax: Any = "plain",
        clip_skip: Any = None,
        emphasis_mode: Any = "original",
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
    ) -> Texts:
        """Those arguments of `Pipeline.__call__`, for a model with texts. Raises PromptErrors, EmbeddingsErrors and
        ClipSkipError."""
        _require_no_pooled(pooled_prompt_embeds)
        embeds = check_embeddings(prompt_embeds, "prompt_embeds", reads.width)
        negative_embeds = check_embeddings(negative_prompt_embeds, "negative_prompt_embeds", reads.width)
        prompt = _in_place(prompt, "prompt", embeds)
        negative_prompt = _in_place(negative_prompt, "negative_prompt", negative_embeds)
        prompts, negatives = checks.check_prompts(prompt, negative_prompt)
        mode = emphasis(_word(emphasis_mode))
        syntax = _word(prompt_syntax)
        skip = check_clip_skip(clip_skip, reads.layers)
        parsed = tuple(parse(text, syntax) for text in prompts)
        return cls(
            tuple(prompts),
            tuple(negatives),
            syntax,
            parsed,
            tuple(_negative(text, syntax) for text in negatives),
            mode,
            skip,
            skip if syntax == "a1111" else 0,
            embeds,
            negative_embeds,
            _loras(parsed),
        )

    @classmethod
    def none(cls, count: int, **arguments: Any) -> Texts:
        """Those of a model without texts, for so many pictures. PromptError for an argument that says something."""
        for name, value in arguments.items():
            if value is not None:
                raise PromptError(f"{name} is given, and this model makes pictures without texts; leave it out")
        return cls(("",) * count, ("",) * count)

    def needs_negative(self, guided: bool) -> bool:
        """Whether the negative prompts take part: with guidance, and where the weights of a prompt's parts are not 1
        together."""
        return guided or any(sum(part.weight for part in prompt.parts) != 1 for prompt in self.parsed)

    def rows(self, guided: bool, most_rows: int = 2) -> int:
        """The U-Net's rows for one picture of each prompt. most_rows: the family's, for a prompt of one part."""
        parts = sum(len(prompt.parts) for prompt in self.parsed)
        return parts + ((most_rows - 1) * len(self.prompts) if self.needs_negative(guided) else 0)

    def again(self, prompts: list[Any] | None, negatives: list[Any] | None) -> Texts:
        """The texts of a second pass: these, or others of the same number where they are given. PromptErrors."""
        if prompts is None and negatives is None:
            return self
        new, against = checks.check_prompts(_keep(prompts, self.prompts), _keep(negatives, self.negatives))
        parsed = tuple(parse(text, self.syntax) for text in new)
        return replace(
            self,
            prompts=tuple(new),
            negatives=tuple(against),
            parsed=parsed,
            loras=_loras(parsed),
            negative=tuple(_negative(text, self.syntax) for text in against),
            embeds=self.embeds if prompts is None else None,
            negative_embeds=self.negative_embeds if negatives is None else None,
        )

    def check_loop(self, steps: int, guided: bool, later: int = 0) -> None:
        """PromptScheduleError for a switch after the last of so many steps, and of so many later ones of a second pass;
        EmbeddingsError for embeddings whose number of tokens does not go with the others'."""
        for prompt in (*self.parsed, *self.negative):
            for part in prompt.parts:
                _check_switches(part.tokens, steps, later)
        if self.needs_negative(guided):
            _check_lengths(self.embeds, self.negative_embeds)


def _keep(given: list[Any] | None, own: Sequence[str]) -> list[Any]:
    return list(own) if given is None else given


def check_embeddings(value: Any, name: str, width: int) -> np.ndarray | None:
    """Embeddings [prompts, tokens, width] as float32; None stays."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 3 or not value.size:
        given = f"an array of {value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else shown(value)
        raise EmbeddingsError(f"{name} is {given}; pass a NumPy array of float32 [prompts, tokens, {width}]")
    if value.shape[2] != width:
        raise EmbeddingsWidthError(
            f"{name} has the shape {value.shape}, and this model takes embeddings of width {width}; make them with "
            "its own text encoder"
        )
    if value.shape[1] > LONGEST or not np.isfinite(value).all():
        raise EmbeddingsError(
            f"{name} has {value.shape[1]} tokens and must hold finite values only, of at most {LONGEST} tokens"
        )
    return np.ascontiguousarray(value, np.float32)


def check_clip_skip(value: Any, layers: int) -> int:
    """How many layers are left out: an integer from 0, fewer than there are; None is 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < layers:
        raise ClipSkipError(
            f"clip_skip is {shown(value)}; it must be an integer from 0 to {layers - 1}: this model's text encoder has "
            f"{layers} layers. diffusers' 1 is A1111's 2"
        )
    return int(value)


def counted_steps(steps: int, evaluations: int) -> int:
    """The steps that a prompt's schedule counts. As in A1111, samplers that evaluate twice a step count twice as many;
    a loop that starts late counts those that it takes."""
    if steps > 2 and evaluations >= 2 * steps - 1:
        return 2 * steps
    return min(steps, evaluations)


def _word(value: Any) -> str:
    """A name, or for a message what was given instead."""
    return value if isinstance(value, str) else shown(value)


def _negative(text: str, syntax: str) -> Prompt:
    prompt = parse(text, syntax, negative=True)
    for adapter in prompt.adapters:
        raise AdapterTagError(
            f"the negative prompt has the tag {shown(str(adapter))}, and both prompts' rows have the same weights; "
            "write the tag into the prompt"
        )
    return prompt


def _loras(prompts: Sequence[Prompt]) -> tuple[Lora, ...]:
    """The adapters that the prompts of a call name, sorted by name. AdapterTagError for prompts that name others."""
    named = [_named(prompt) for prompt in prompts]
    for number, loras in enumerate(named):
        if loras != named[0]:
            raise AdapterTagError(
                f"prompt 1 has the tags {_written(prompts[0])} and prompt {number + 1} {_written(prompts[number])}; "
                "one call has one set of adapters, so write the same tags into all prompts, or make two calls"
            )
    return named[0] if named else ()


def _named(prompt: Prompt) -> tuple[Lora, ...]:
    found: dict[str, Lora] = {}
    for one in map(lora, prompt.adapters):
        if one.name in found:
            raise AdapterTagError(f"a prompt has two tags for the adapter {shown(one.name)}; write one")
        found[one.name] = one
    return tuple(found[name] for name in sorted(found))


def _written(prompt: Prompt) -> str:
    return shown("".join(map(str, prompt.adapters))) if prompt.adapters else "none"


def _in_place(text: Any, name: str, embeds: np.ndarray | None) -> Any:
    """The text, or empty ones if embeddings take its place."""
    if embeds is None:
        return text
    if text is not None:
        raise EmbeddingsError(f"{name} and {name}_embeds both say what the {name} is; pass one of them")
    return [""] * len(embeds)


def _require_no_pooled(value: Any) -> None:
    if value is not None:
        raise EmbeddingsError(
            "pooled_prompt_embeds is given, and this model's U-Net takes no pooled embeddings; leave it out"
        )


def _check_switches(tokens: Iterable[Any], steps: int, later: int) -> None:
    most = 2.0 if later else 1.0
    for token in tokens:
        if (
            isinstance(token, Open)
            and token.when is not None
            and token.when > (most if token.fraction else steps + later)
        ):
            when = f"{token.when:g} of the steps" if token.fraction else f"step {token.when:g}"
            raise PromptScheduleError(
                f"the prompt changes at {when}, and the loop has {steps + later} steps; write a step up to "
                f"{steps + later}, or a part of the steps up to {most}"
            )


def _check_lengths(embeds: np.ndarray | None, negative: np.ndarray | None) -> None:
    if embeds is not None and negative is not None and embeds.shape != negative.shape:
        raise EmbeddingsError(
            f"prompt_embeds has the shape {embeds.shape} and negative_prompt_embeds {negative.shape}; they must be the "
            "same"
        )
    if (embeds is None) != (negative is None):
        given: Sequence[int] = (embeds if embeds is not None else negative).shape  # type: ignore[union-attr]
        if given[1] % PROMPT_TOKENS:
            raise EmbeddingsError(
                f"embeddings of {given[1]} tokens are given beside texts, which have a multiple of {PROMPT_TOKENS}; "
                "pass both prompt_embeds and negative_prompt_embeds"
            )
