"""Where a model comes from: the built-in one, a diffusers folder, a hub id, a CompVis file, or random weights.

Every source hands out one part at a time, in float32, so that no two large parts need to be in memory together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.bundle import sha256
from engine.errors import shown

from ..errors import NoNetworkError, UnknownModelError, UnreadableModelError, UnsupportedModelError, UsageError
from . import checks, compvis, schedulers, weights
from .presets import ARCHITECTURES, CLIP_VOCABULARY, Architecture
from .reading import read_object, reading

BUILT_IN = Path(__file__).parents[1] / "demo" / "model"
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
HASHED = {".json", ".txt", ".safetensors", ".bin"}
"""Suffixes of the files that a part of a diffusers folder is made of."""

HUB_FILES = (
    "model_index.json",
    "scheduler/*",
    "tokenizer/*",
    *(f"{part}/*.{kind}" for part in ("text_encoder", "unet", "vae") for kind in ("json", "safetensors")),
)
"""What a hub model is downloaded of: no pickles, no safety checker."""

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""What a model_index.json says of the models that are supported."""

PREDICTION_TYPES = ("epsilon", "v_prediction")

T = TypeVar("T")


class Source(ABC):
    """A model. `name` is what its bundle is called, `origin` what the manifest says about where it came from, `inputs`
    the files and folders that it is read from, `options` what was asked for besides, as the command line calls it."""

    def __init__(self, name: str, origin: Mapping[str, str], inputs: tuple[Path, ...] = ()) -> None:
        self.name, self.origin, self.inputs = name, dict(origin), inputs
        self.options: dict[str, str] = {}
        self._fingerprints: dict[str, str] = {}

    @abstractmethod
    def text_encoder(self) -> CLIPTextModel: ...

    @abstractmethod
    def unet(self) -> UNet2DConditionModel: ...

    @abstractmethod
    def vae(self) -> AutoencoderKL: ...

    @abstractmethod
    def tokenizer(self) -> CLIPTokenizer: ...

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """The configuration of "text_encoder", "unet" or "vae", with its defaults."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """scheduler_config.json as the bundle ships it: one that the runtime makes pictures with."""

    @abstractmethod
    def sample_size(self) -> int:
        """Height and width in pixels that the model was trained at."""

    @abstractmethod
    def _fingerprint(self, part: str) -> str: ...

    def fingerprint(self, part: str) -> str:
        """A hash of everything that determines one of PARTS. It is computed once: files that change later are seen by a
        new Source."""
        if part not in self._fingerprints:
            self._fingerprints[part] = self._fingerprint(part)
        return self._fingerprints[part]

    def check(self) -> None:
        """Whether a bundle of this model can be built and will run: configurations, scheduler, tokenizer, then every
        tensor.

        Raises UnreadableModelError, UnsupportedModelError, UnsafePickleError or UsageError. Large parts are loaded one
        by one.
        """
        unet, text_encoder = self.config("unet"), self.config("text_encoder")
        checks.check_unet(unet)
        checks.check_vae(self.config("vae"))
        checks.check_text_encoder(text_encoder)
        checks.check_width(unet, text_encoder)
        self.sample_size()
        self.scheduler_config()
        checks.check_tokenizer(self.tokenizer(), self._tokenizer_name(), text_encoder["vocab_size"])
        self._check_weights()

    def _tokenizer_name(self) -> str:
        return "the tokenizer"

    def _check_weights(self) -> None:
        """Every part is loaded and runs once on a small input: options that a constructor takes may still fail
        there."""
        for part, load in (("text encoder", self.text_encoder), ("VAE", self.vae), ("U-Net", self.unet)):
            model = load()
            reading(f"the {part} of {self.name}", lambda model=model: checks.run_once(model))  # type: ignore[misc]
            del model

    def pipeline(self) -> StableDiffusionPipeline:
        """diffusers' own pipeline of the model, float32 on the CPU: the oracle."""
        config = self.scheduler_config()
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        pipeline = StableDiffusionPipeline(
            vae=self.vae(),
            text_encoder=self.text_encoder(),
            tokenizer=self.tokenizer(),
            unet=self.unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def resolve(
    model: str | None,
    random_weights: bool = False,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    scheduler: str | None = None,
) -> Source:
    """The source that a command line means by MODEL. `tokenizer` and `prediction_type` are for single files;
    `scheduler` is a name of engine.sampling.samplers.SAMPLERS or a diffusers class name, shipped instead of the model's
    own.

    Raises UnknownModelError, UnreadableModelError, UnsupportedModelError, UnsafePickleError, NoNetworkError or
    UsageError.
    """
    source = _resolve(
        model,
        random_weights,
        tokenizer,
        prediction_type,
        None if scheduler is None else schedulers.asked_sampler(scheduler),
    )
    given = {
        "tokenizer": tokenizer and str(tokenizer.resolve()),
        "prediction-type": prediction_type,
        "scheduler": scheduler,
    }
    source.options = {name: value for name, value in given.items() if value}
    return source


def _resolve(
    model: str | None, random_weights: bool, tokenizer: Path | None, prediction_type: str | None, sampler: str | None
) -> Source:
    if random_weights:
        if model not in ARCHITECTURES:
            raise UsageError(
                f"--random-weights needs a known architecture, not {model!r}; known: {', '.join(ARCHITECTURES)}"
            )
        _refuse_file_options(f"{model} --random-weights", tokenizer, prediction_type)
        return RandomWeights(model, sampler=sampler)
    if model is not None and (file := _checkpoint(model)) is not None:
        return CompVisFile(file, tokenizer, prediction_type, sampler)
    _refuse_file_options("the built-in model" if model is None else model, tokenizer, prediction_type)
    if model is None:
        return DiffusersFolder(BUILT_IN, "demo", {"kind": "built-in", "id": "demo"}, sampler)
    path = Path(model)
    if path.is_dir():
        name = path.resolve().name
        return DiffusersFolder(path, name, {"kind": "folder", "id": name, "path": str(path.resolve())}, sampler)
    if model in ARCHITECTURES:
        raise UnknownModelError(
            f"{model} is an architecture, not a model; add --random-weights to build it without trained weights"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.parent.is_dir():
        return DiffusersFolder(_download(model), model.split("/")[1], {"kind": "hub", "id": model}, sampler)
    if {"/", os.sep} & set(model):
        raise UnknownModelError(f"there is no file or folder {model}; check the path, or pass a hub id like owner/name")
    raise UnknownModelError(
        f"{model!r} is no folder or file here, and not a hub id like owner/name; known architectures for "
        f"--random-weights: {', '.join(ARCHITECTURES)}"
    )


def _checkpoint(model: str) -> Path | None:
    """The single file that MODEL means, None where it means something else. UnknownModelError for files that cannot be
    one."""
    path = Path(model)
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as error:  # too long, or in a folder that may not be read
        raise UnknownModelError(f"{shown(model)} cannot be looked at: {error.strerror}") from error
    known = path.suffix.lower() in weights.CHECKPOINT_SUFFIXES
    if not model or (exists and not folder and not path.is_file()):
        raise UnknownModelError(
            f"{model!r} is neither a folder nor a file; pass a diffusers folder or a single file ({_suffixes()})"
        )
    if exists and not folder and not known:
        raise UnknownModelError(
            f"{model} is a file of a kind that is not supported ({path.suffix or 'no suffix'}); a single file must be "
            "one of "
            f"{_suffixes()}, and a diffusers model is a folder"
        )
    if not exists and known:
        raise UnknownModelError(f"there is no file {model}; check the path")
    return path if exists and not folder else None


def _suffixes() -> str:
    return ", ".join(weights.CHECKPOINT_SUFFIXES)


def _refuse_file_options(what: str, tokenizer: Path | None, prediction_type: str | None) -> None:
    """UsageError for options that only a single file has a use for."""
    for option, value in (("--tokenizer", tokenizer), ("--prediction-type", prediction_type)):
        if value is not None:
            raise UsageError(
                f"{option} {value} is for a single file ({_suffixes()}); {what} says this itself, so leave the option "
                "out"
            )


def _download(
    repository: str,
    allow: tuple[str, ...] = HUB_FILES,
    otherwise: str = "pass its folder; if a folder here is meant, check its path",
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(allow), ignore_patterns=["*non_ema*"]))
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UnknownModelError(
            f"the hub has no model {repository!r} that you may read; check the id, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise NoNetworkError(
            f"{repository} is not in the local cache and the hub could not be reached ({type(error).__name__}); "
            f"check the network, or download it elsewhere and {otherwise}"
        ) from error


def _hash_files(folder: Path, root: Path, suffixes: set[str]) -> str:
    """A hash of the files in a folder that have one of the suffixes: of their contents, and their names in `root`."""
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    lines = [f"{file.relative_to(root).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_tokenizer(folder: Path, **options: str) -> CLIPTokenizer:
    """The CLIP tokenizer in a folder."""
    file = folder / "tokenizer_config.json"
    checks.check_tokenizer_config(read_object(file), str(file))
    return reading(folder, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options))


class DiffusersFolder(Source):
    """A folder as diffusers' `save_pretrained` writes it."""

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str], sampler: str | None = None) -> None:
        super().__init__(name, origin, (folder,))
        self.folder, self._sampler = folder, sampler
        self._index = reading(folder, self._read_index)

    def _read_index(self) -> dict[str, Any]:
        file = self.folder / "model_index.json"
        if not file.exists():
            raise UnreadableModelError(
                f"{self.folder} has no model_index.json, so it is not a diffusers model; pass the folder that "
                "save_pretrained wrote"
            )
        index = read_object(file)
        _check_index(index, file)
        for part in PARTS:
            if not (self.folder / part).is_dir():
                raise UnreadableModelError(f"{self.folder} has no folder {part}/; the model is incomplete")
        return index

    def _load(self, cls: Any, part: str, safetensors: str, pickle: str, **options: Any) -> Any:
        folder = self.folder / part
        chosen = reading(folder, lambda: weights.choose(folder, safetensors, pickle))
        for file in chosen.files:
            weights.check_floats(file)
        model, info = reading(
            folder,
            lambda: cls.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **chosen.options,
                **options,
            ),
        )
        weights.check_loading(folder, info)
        weights.check_finite(folder, model)
        return model

    def text_encoder(self) -> CLIPTextModel:
        return self._load(CLIPTextModel, "text_encoder", "model.safetensors", "pytorch_model.bin")

    def unet(self) -> UNet2DConditionModel:
        return self._load_diffusers(UNet2DConditionModel, "unet")

    def vae(self) -> AutoencoderKL:
        return self._load_diffusers(AutoencoderKL, "vae")

    def _load_diffusers(self, cls: Any, part: str) -> Any:
        name = "diffusion_pytorch_model"
        return self._load(cls, part, f"{name}.safetensors", f"{name}.bin", low_cpu_mem_usage=False)

    def tokenizer(self) -> CLIPTokenizer:
        return _read_tokenizer(self.folder / "tokenizer")

    def _tokenizer_name(self) -> str:
        return str(self.folder / "tokenizer")

    def config(self, part: str) -> dict[str, Any]:
        file = self.folder / part / "config.json"
        given = read_object(file)
        if part == "text_encoder":
            return reading(file, lambda: CLIPTextConfig.from_pretrained(file.parent, local_files_only=True).to_dict())
        return checks.with_defaults(UNet2DConditionModel if part == "unet" else AutoencoderKL, given)

    def scheduler_config(self) -> dict[str, Any]:
        file = self.folder / "scheduler" / "scheduler_config.json"
        config, named = read_object(file), self._index["scheduler"][1]
        if self._sampler is None and config.get("_class_name", named) != named:
            raise UnreadableModelError(
                f"{file} has _class_name={shown(config['_class_name'])} and model_index.json {named}; make them the "
                "same, or ship "
                f"another scheduler with --scheduler NAME"
            )
        return schedulers.shipped(config, str(file), self._sampler)

    def sample_size(self) -> int:
        return 8 * checks.latent_size(self.config("unet"))

    def _fingerprint(self, part: str) -> str:
        folder = self.folder / part
        return reading(folder, lambda: _hash_files(folder, self.folder, HASHED))


def _check_index(index: Mapping[str, Any], file: Path) -> None:
    """UnsupportedModelError for a model_index.json of another kind of model, UnreadableModelError for a garbled one."""
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES or "text_encoder_2" in index:
        raise UnsupportedModelError(
            f"{file} is of a {shown(pipeline)}; supported are {checks.MODELS} ({' or '.join(PIPELINES)})"
        )
    for part in PARTS:
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
            raise UnreadableModelError(
                f"{file} has {part}={shown(entry)}; it must be the library and the class, "
                f"for example {json.dumps(CLASSES.get(part, ('diffusers', 'DDIMScheduler')))}"
            )
    for part, expected in CLASSES.items():
        if index[part][1] != expected[1]:
            raise UnsupportedModelError(
                f"{file} is of a {pipeline} with {part}={index[part][1]}; supported are {checks.MODELS} "
                f"({part}={expected[1]}, one text encoder)"
            )


class RandomWeights(Source):
    """A known architecture with seeded random weights: for sizes, speed and tests, not for pictures that mean
    something."""

    def __init__(self, name: str, seed: int = 0, sampler: str | None = None) -> None:
        super().__init__(f"{name}-random", {"kind": "random", "id": name})
        self.seed, self._sampler = seed, sampler
        self._architecture: Architecture = ARCHITECTURES[name]

    def _build(self, make: Callable[[], T]) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make()

    def text_encoder(self) -> CLIPTextModel:
        return self._build(
            lambda: CLIPTextModel(
                CLIPTextConfig(
                    **self._architecture.text_encoder,
                    bos_token_id=CLIP_VOCABULARY - 2,
                    eos_token_id=CLIP_VOCABULARY - 1,
                )
            ).eval()
        )

    def unet(self) -> UNet2DConditionModel:
        return self._build(lambda: UNet2DConditionModel(**self._architecture.unet).eval())

    def vae(self) -> AutoencoderKL:
        return self._build(lambda: AutoencoderKL(**self._architecture.vae).eval())

    def tokenizer(self) -> CLIPTokenizer:
        """The built-in model's merges with CLIP's ids for the start and the end: ids in the right range, words of its
        own."""
        vocabulary = json.loads((BUILT_IN / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        merges = (BUILT_IN / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        vocabulary |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
        return CLIPTokenizer(
            vocabulary,
            [tuple(merge.split(" ")) for merge in merges],
            pad_token=self._architecture.pad_token,
            model_max_length=77,
        )

    def scheduler_config(self) -> dict[str, Any]:
        return schedulers.shipped(self._architecture.scheduler, self.name, self._sampler)

    def config(self, part: str) -> dict[str, Any]:
        return config_of(self._architecture, part)

    def _check_weights(self) -> None:
        """They are made, not read."""

    def sample_size(self) -> int:
        return int(self._architecture.vae["sample_size"])

    def _fingerprint(self, part: str) -> str:
        config = json.dumps([self._architecture.__dict__, self.seed, part, torch.__version__], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()


def config_of(known: Architecture, part: str) -> dict[str, Any]:
    """The configuration of a part of a known architecture, with its defaults."""
    if part == "text_encoder":
        return CLIPTextConfig(**known.text_encoder).to_dict()
    return checks.with_defaults(*((UNet2DConditionModel, known.unet) if part == "unet" else (AutoencoderKL, known.vae)))


class CompVisFile(Source):
    """A single .safetensors or .ckpt file with the names of the CompVis and Stability repositories."""

    def __init__(
        self, file: Path, tokenizer: Path | None, prediction_type: str | None, sampler: str | None = None
    ) -> None:
        if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
            raise UsageError(f"--prediction-type is {prediction_type!r}; it must be {' or '.join(PREDICTION_TYPES)}")
        if tokenizer is not None and not tokenizer.is_dir():
            raise UsageError(
                f"--tokenizer {tokenizer} is {'not a folder' if tokenizer.exists() else 'not there'}; pass the folder "
                "of a CLIP tokenizer "
                f"(tokenizer.json, or vocab.json and merges.txt)"
            )
        if tokenizer is not None:
            _read_tokenizer(tokenizer)
        super().__init__(
            file.stem,
            {"kind": "file", "id": file.name, "path": str(file.resolve())},
            (file, *([] if tokenizer is None else [tokenizer])),
        )
        self.file, self._sampler = file, sampler
        self._weights = weights.read(file)
        self._architecture = reading(file, lambda: compvis.architecture(self._weights, file, prediction_type))
        self._hash = reading(file, lambda: sha256(file))
        self._tokenizer_folder = tokenizer or _download(
            CLIP_TOKENIZER, ("*.json", "*.txt"), "pass its folder with --tokenizer FOLDER"
        )

    def text_encoder(self) -> CLIPTextModel:
        return self._checked(compvis.text_encoder)

    def unet(self) -> UNet2DConditionModel:
        return self._checked(compvis.unet)

    def vae(self) -> AutoencoderKL:
        return self._checked(compvis.vae)

    def _checked(self, convert: Callable[..., Any]) -> Any:
        model = reading(self.file, lambda: convert(self.file, self._weights, self._architecture))
        weights.check_finite(self.file, model)
        return model

    def tokenizer(self) -> CLIPTokenizer:
        return _read_tokenizer(self._tokenizer_folder, pad_token=self._architecture.pad_token)

    def _tokenizer_name(self) -> str:
        return str(self._tokenizer_folder)

    def config(self, part: str) -> dict[str, Any]:
        return config_of(self._architecture, part)

    def scheduler_config(self) -> dict[str, Any]:
        return schedulers.shipped(self._architecture.scheduler, str(self.file), self._sampler)

    def sample_size(self) -> int:
        return 8 * int(self._architecture.unet["sample_size"])

    def _fingerprint(self, part: str) -> str:
        if part == "tokenizer":
            folder = self._tokenizer_folder
            return reading(folder, lambda: _hash_files(folder, folder, {".json", ".txt"}))
        config = json.dumps([self._hash, part, self._architecture.scheduler], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()
