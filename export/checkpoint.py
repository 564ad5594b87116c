"""Where a model comes from: the built-in one, a diffusers folder, a hub id, a CompVis file, or random weights.

Every source hands out one part at a time, in float32, so that no two large parts need to be in memory together.
"""
from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.bundle import sha256

from . import compvis
from .errors import ExportError, NoNetworkError, UnknownModelError, UnreadableModelError, UnsafePickleError, UnsupportedModelError, UsageError
from .presets import ARCHITECTURES, CLIP_VOCABULARY, Architecture

BUILT_IN = Path(__file__).parent / "demo" / "model"
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")

HUB_FILES = ("model_index.json", "scheduler/*", "tokenizer/*", *(f"{part}/*.{kind}" for part in ("text_encoder", "unet", "vae")
                                                               for kind in ("json", "safetensors")))
"""What a hub model is downloaded of: no pickles, no safety checker."""

T = TypeVar("T")


class Source(ABC):
    """A model. `name` is what its bundle is called, `origin` what the manifest says about where it came from."""

    name: str
    origin: dict[str, str]
    inputs: tuple[Path, ...] = ()

    def check(self) -> None:  # noqa: B027
        """Finds what is wrong before anything is traced."""

    @abstractmethod
    def text_encoder(self) -> CLIPTextModel: ...

    @abstractmethod
    def unet(self) -> UNet2DConditionModel: ...

    @abstractmethod
    def vae(self) -> AutoencoderKL: ...

    @abstractmethod
    def tokenizer(self) -> CLIPTokenizer: ...

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]: ...

    @abstractmethod
    def sample_size(self) -> int:
        """Height and width in pixels that the model was trained at."""

    @abstractmethod
    def fingerprint(self, part: str) -> str:
        """A hash of everything that determines one of PARTS."""

    def pipeline(self) -> StableDiffusionPipeline:
        """diffusers' own pipeline of the model, float32 on the CPU: the oracle."""
        config = self.scheduler_config()
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        pipeline = StableDiffusionPipeline(
            vae=self.vae(), text_encoder=self.text_encoder(), tokenizer=self.tokenizer(), unet=self.unet(), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def resolve(model: str | None, random_weights: bool = False, tokenizer: Path | None = None, prediction_type: str | None = None) -> Source:
    """The source that a command line means by MODEL.

    Raises UnknownModelError, UnreadableModelError, UnsupportedModelError, UnsafePickleError, NoNetworkError or UsageError.
    """
    if random_weights:
        if model not in ARCHITECTURES:
            raise UsageError(f"--random-weights needs a known architecture, not {model!r}; known: {', '.join(ARCHITECTURES)}")
        return RandomWeights(model)
    if model is None:
        return DiffusersFolder(BUILT_IN, "demo", {"kind": "built-in", "id": "demo"})
    path = Path(model)
    if path.is_dir():
        return DiffusersFolder(path, path.resolve().name, {"kind": "folder", "id": path.resolve().name})
    if path.suffix in (".safetensors", ".ckpt"):
        if not path.is_file():
            raise UnknownModelError(f"there is no file {path}")
        return CompVisFile(path, tokenizer, prediction_type)
    if model in ARCHITECTURES:
        raise UnknownModelError(f"{model} is an architecture, not a model; add --random-weights to build it without trained weights")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return DiffusersFolder(_download(model), model.split("/")[1], {"kind": "hub", "id": model})
    raise UnknownModelError(f"{model!r} is no folder or file here, and not a hub id like owner/name; known architectures for "
                            f"--random-weights: {', '.join(ARCHITECTURES)}")


def _download(repository: str, allow: tuple[str, ...] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return Path(snapshot_download(repository, allow_patterns=list(allow), ignore_patterns=["*non_ema*"]))
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UnknownModelError(f"the hub has no model {repository!r} that you may read; check the id, or log in with `hf auth login`") from error
    except (LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise NoNetworkError(f"{repository} is not in the local cache and the hub could not be reached ({type(error).__name__}); "
                             f"check the network, or download the model elsewhere and pass its folder") from error


def _reading(what: str, load: Callable[[], T]) -> T:
    """Runs a loader of diffusers or transformers; whatever it raises becomes a named error."""
    try:
        return load()
    except ExportError:
        raise
    except Exception as error:  # both libraries raise many types for files that are damaged or missing
        if "weights_only" in str(error) or "Weights only load failed" in str(error):
            raise UnsafePickleError(f"{what} is a pickle that holds more than tensors, so loading it could run code; "
                                    f"convert it to safetensors where you trust it") from error
        raise UnreadableModelError(f"{what} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _hash_files(files: list[Path], root: Path) -> str:
    lines = [f"{file.relative_to(root).as_posix()} {sha256(file)}" for file in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class DiffusersFolder(Source):
    """A folder as diffusers' `save_pretrained` writes it."""

    def __init__(self, folder: Path, name: str, origin: dict[str, str]) -> None:
        self.folder, self.name, self.origin, self.inputs = folder, name, origin, (folder,)
        index = folder / "model_index.json"
        if not index.is_file():
            raise UnreadableModelError(f"{folder} has no model_index.json, so it is not a diffusers model; pass the folder that save_pretrained wrote")
        self._index = _reading(str(index), lambda: json.loads(index.read_text(encoding="utf-8")))
        classes = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        for part, expected in classes.items():
            found = (self._index.get(part) or [None, None])[1]
            if found != expected or "text_encoder_2" in self._index:
                raise UnsupportedModelError(f"{folder} is a {self._index.get('_class_name')} with {part}={found}; supported are text-to-image "
                                            f"models of Stable Diffusion 1.x and 2.x ({part}={expected}, one text encoder)")
        for part in PARTS:
            if not (folder / part).is_dir():
                raise UnreadableModelError(f"{folder} has no folder {part}/; the model is incomplete")

    def _load(self, cls: Any, part: str) -> Any:
        folder = self.folder / part
        halved = not any(folder.glob("*model.safetensors")) and any(folder.glob("*model.fp16.safetensors"))
        options = {"variant": "fp16"} if halved else {}
        return _reading(str(folder), lambda: cls.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, **options))

    def text_encoder(self) -> CLIPTextModel:
        return self._load(CLIPTextModel, "text_encoder")

    def unet(self) -> UNet2DConditionModel:
        return self._load(UNet2DConditionModel, "unet")

    def vae(self) -> AutoencoderKL:
        return self._load(AutoencoderKL, "vae")

    def tokenizer(self) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        return _reading(str(folder), lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True))

    def scheduler_config(self) -> dict[str, Any]:
        file = self.folder / "scheduler" / "scheduler_config.json"
        return _reading(str(file), lambda: json.loads(file.read_text(encoding="utf-8")))

    def sample_size(self) -> int:
        config = _reading(f"{self.folder}/unet/config.json", lambda: json.loads((self.folder / "unet/config.json").read_text(encoding="utf-8")))
        size = config.get("sample_size") or 64
        return 8 * int(size[0] if isinstance(size, list) else size)

    def fingerprint(self, part: str) -> str:
        kept = {".json", ".txt", ".safetensors", ".bin"}
        return _hash_files([file for file in (self.folder / part).iterdir() if file.suffix in kept], self.folder)


class RandomWeights(Source):
    """A known architecture with seeded random weights: for sizes, speed and tests, not for pictures that mean something."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.seed = f"{name}-random", seed
        self.origin = {"kind": "random", "id": name}
        self._architecture: Architecture = ARCHITECTURES[name]

    def _build(self, make: Callable[[], T]) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make()

    def text_encoder(self) -> CLIPTextModel:
        return self._build(lambda: CLIPTextModel(CLIPTextConfig(
            **self._architecture.text_encoder, bos_token_id=CLIP_VOCABULARY - 2, eos_token_id=CLIP_VOCABULARY - 1)).eval())

    def unet(self) -> UNet2DConditionModel:
        return self._build(lambda: UNet2DConditionModel(**self._architecture.unet).eval())

    def vae(self) -> AutoencoderKL:
        return self._build(lambda: AutoencoderKL(**self._architecture.vae).eval())

    def tokenizer(self) -> CLIPTokenizer:
        """The built-in model's merges with CLIP's ids for the start and the end: ids in the right range, words of its own."""
        vocabulary = json.loads((BUILT_IN / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        merges = (BUILT_IN / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        vocabulary |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
        return CLIPTokenizer(vocabulary, [tuple(merge.split(" ")) for merge in merges], pad_token=self._architecture.pad_token,
                             model_max_length=77)

    def scheduler_config(self) -> dict[str, Any]:
        return dict(self._architecture.scheduler)

    def sample_size(self) -> int:
        return int(self._architecture.vae["sample_size"])

    def fingerprint(self, part: str) -> str:
        config = json.dumps([self._architecture.__dict__, self.seed, part, torch.__version__], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()


class CompVisFile(Source):
    """A single .safetensors or .ckpt file with the names of the CompVis and Stability repositories."""

    def __init__(self, file: Path, tokenizer: Path | None, prediction_type: str | None) -> None:
        self.file, self.name = file, file.stem
        self.origin = {"kind": "file", "id": file.name}
        self._hash = sha256(file)
        self._weights = _reading(str(file), lambda: compvis.read(file))
        self._architecture = _reading(str(file), lambda: compvis.architecture(self._weights, file, prediction_type))
        self._tokenizer_folder = tokenizer or _download(CLIP_TOKENIZER, ("*.json", "*.txt"))

    def text_encoder(self) -> CLIPTextModel:
        return _reading(str(self.file), lambda: compvis.text_encoder(self._weights, self._architecture))

    def unet(self) -> UNet2DConditionModel:
        return _reading(str(self.file), lambda: compvis.unet(self._weights, self._architecture))

    def vae(self) -> AutoencoderKL:
        return _reading(str(self.file), lambda: compvis.vae(self._weights, self._architecture))

    def tokenizer(self) -> CLIPTokenizer:
        return _reading(str(self._tokenizer_folder), lambda: CLIPTokenizer.from_pretrained(
            self._tokenizer_folder, local_files_only=True, pad_token=self._architecture.pad_token))

    def scheduler_config(self) -> dict[str, Any]:
        return dict(self._architecture.scheduler)

    def sample_size(self) -> int:
        return 8 * int(self._architecture.unet["sample_size"])

    def fingerprint(self, part: str) -> str:
        if part == "tokenizer":
            return _hash_files([file for file in self._tokenizer_folder.iterdir() if file.suffix in (".json", ".txt")], self._tokenizer_folder)
        config = json.dumps([self._hash, part, self._architecture.scheduler], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()
