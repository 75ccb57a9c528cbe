"""Weights on the Hugging Face hub: their names, and their files in the usual cache (HF_HUB_OFFLINE is respected)."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedtalos.errors import InputError
from fedtalos.facts import check_free
from fedtalos.models.weights.pixels import MOST_BYTES

FILES = (".safetensors", ".pth.tar", ".pth", ".pt", ".bin", ".ckpt")
"""Endings that tell a weights file from a name on the hub, where no such file is there."""

USUAL = ("model.safetensors", "pytorch_model.bin")
"""Usual names of a repository's weights, best first."""

NAMES = {
    "pretrained": {s: f"vit_{s}_patch16_224.augreg_in21k_ft_in1k" for s in ("tiny", "small", "base", "large")},
    "dino": {s: f"vit_{s}_patch16_224.dino" for s in ("small", "base")},
}
"""timm's names of our two short names, by model size."""


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on this machine.

    >>> WeightsFile(Path("vit.safetensors"), configs=[Path("vit.json")], label="vit.safetensors").label
    'vit.safetensors'
    """

    path: Path
    configs: list[Path]
    """The folder's JSON files that may say what its pixels were; they need not be there."""
    label: str
    """Name for messages and records."""
    own: Path | None = None
    """The JSON file of its stem, which need not be there."""


def hub_address(source: str, size: str) -> tuple[str, str | None]:
    """Give the repository that ``source`` means, and the file in it where one is named.

    Raises InputError where it means none.

    >>> hub_address("dino", "small")
    ('timm/vit_small_patch16_224.dino', None)
    >>> hub_address("hf:owner/repo/vit.pth", "small")
    ('owner/repo', 'vit.pth')
    """
    if source in NAMES:
        names = NAMES[source]
        if size not in names:
            raise InputError(
                f"weights {source}: published for model sizes {', '.join(names)}, not for {size}; "
                "give one of those as model_size, or weights none or FILE"
            )
        return f"timm/{names[size]}", None
    if named := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/(.+))?", source):
        repo, file = named.groups()
        if file is None or file.endswith(FILES):
            return repo, file
    elif re.fullmatch(r"(vit|deit3?)_[\w.]+", source):
        return f"timm/{source}", None
    raise InputError(
        f"weights {source}: expected none, pretrained, dino, a timm ViT's name such as vit_base_patch16_224.dino, "
        "hf:OWNER/REPO[/FILE], timm:NAME or torch:NAME (other models), a run's name, or a file; "
        f"files end in {', '.join(FILES)}"
    )


def download(repo: str, file: str | None = None) -> WeightsFile:
    """Fetch a repository's weights: ``file``, or else its model.safetensors or pytorch_model.bin.

    Raises InputError where they are neither in the cache nor to be had, and before they are fetched where they are
    larger than the memory that is free.

    >>> download("timm/vit_small_patch16_224.dino").label
    'hub:timm/vit_small_patch16_224.dino@3f2c...'
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries speak for themselves in our one sentence
    candidates = USUAL if file is None else (file,)
    # timm's configs say mean and std; transformers keeps them in a file of their own.
    about = ("config.json",) if repo.startswith("timm/") else ("preprocessor_config.json", "config.json")
    try:
        weights = next((path for name in candidates if (path := _fetch(repo, name)) is not None), None)
        if weights is not None:
            name = file or weights.name
            revision = weights.parents[len(PurePosixPath(name).parts) - 1].name  # the cache's snapshots/REVISION/FILE
            configs = [path for name in about if (path := _fetch(repo, name, revision, MOST_BYTES)) is not None]
    except InputError:
        raise
    except Exception as error:  # httpx's, requests' and the hub's own errors share no narrower base
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise InputError(
            f"weights: {repo} could not be fetched from {constants.ENDPOINT} ({why}); "
            "check the name and the connection, or give weights FILE or none"
        ) from error
    if weights is None:
        raise InputError(f"weights: {repo} holds no {' or '.join(candidates)}; name its file: hf:{repo}/FILE")
    return WeightsFile(weights, configs, f"hub:{repo}{f'/{file}' if file else ''}@{revision}")


def _fetch(repo: str, name: str, revision: str | None = None, most: int | None = None) -> Path | None:
    """Find a file in the hub's cache, or fetch it; None where the repository holds none of that name.

    Raises InputError where it is said to be of more than ``most`` bytes; without, of more than the free memory takes.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repo, name, revision=revision)  # no request where an earlier run fetched it
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else known not to be there
    bounds: dict[str, Any] = {}
    try:
        with suppress(EntryNotFoundError):  # the cache is to note it, below
            size = _stated_size(repo, name, revision, most)
            bounds["tqdm_class"] = _bar_up_to(2 * size + 2**20, f"{repo}/{name}")
        return Path(hf_hub_download(repo, name, revision=revision, **bounds))
    except LocalEntryNotFoundError:  # offline, or no answer: nobody knows
        raise
    except EntryNotFoundError:
        return None


def _stated_size(repo: str, name: str, revision: str | None, most: int | None) -> int:
    """Look at what the hub says of a file: its size, and names that the cache makes paths of."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    said = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    names = said.etag or "", said.commit_hash or ""
    if said.size is None or not all(re.fullmatch(r"\w[\w.-]{,199}", each) for each in names):
        raise InputError(f"weights: {repo}/{name} comes without a size, a revision or a usual ETag; give weights FILE")
    if most is None:
        check_free(2 * said.size, f"weights {repo}/{name}: of {said.size / 1e9:.1f} GB", "give another")
    elif said.size > most:
        raise InputError(f"weights: {repo}/{name} holds {said.size} bytes, of which {most} are the limit; give another")
    return said.size


def _bar_up_to(most: int, label: str) -> type:
    """Make a progress bar that ends, with an InputError, a download of more bytes: a server may send without end."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bounded(tqdm):
        seen = 0

        def update(self, n: float | None = 1) -> Any:
            self.seen += int(n or 0)
            if self.seen > most:
                raise InputError(f"weights: {label} is longer than it was said to be; give weights FILE")
            return super().update(n)

    return Bounded
