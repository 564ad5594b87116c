"""Downloads from the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import NoNetworkError, UnknownModelError

HUB_FILES = (
    "model_index.json",
    "scheduler/*",
    "tokenizer/*",
    *(f"{part}/*.{kind}" for part in ("text_encoder", "unet", "vae") for kind in ("json", "safetensors")),
)
"""The files that are downloaded of a hub model: no pickles, no safety checker."""


def download(
    repository: str,
    allow: tuple[str, ...] = HUB_FILES,
    otherwise: str = "pass its folder; if a folder here is meant, check its path",
) -> Path:
    """The folder of a hub model's files, from the cache or the network. UnknownModelError or NoNetworkError."""
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
