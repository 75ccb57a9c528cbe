"""timm's weights on the Hugging Face hub: names, and files in the usual hub cache (HF_HUB_OFFLINE is respected)."""

import re
from pathlib import Path

from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import ModelSize

FILES = (".safetensors", ".pth", ".pt")
"""What a weights file is called, as against a name on the hub."""

NAMES = {
    "pretrained": {s: f"vit_{s}_patch16_224.augreg_in21k_ft_in1k" for s in ("tiny", "small", "base", "large")},
    "dino": {s: f"vit_{s}_patch16_224.dino" for s in ("small", "base")},
}


def hub_name(source: str, size: ModelSize) -> str:
    """The timm model that ``source`` means for ``size``; InputError where there is none."""
    if source in NAMES:
        names = NAMES[source]
        if size not in names:
            raise InputError(
                f"--weights {source}: published for model sizes {', '.join(names)}, not for {size}; "
                "give one of those as --model_size, or --weights none or FILE"
            )
        return names[size]
    if not re.fullmatch(r"(vit|deit)_[\w.]+", source):
        raise InputError(
            f"--weights {source}: expected none, pretrained, dino, a timm model name such as "
            f"vit_base_patch16_224.dino, or a file ending in {', '.join(FILES)}"
        )
    return source


def download(name: str) -> tuple[Path, Path, str]:
    """model.safetensors and config.json of timm/NAME in the hub's cache, and what to call them.

    Raises InputError where they are neither in the cache nor to be had.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries speak for themselves in our one sentence
    repo = f"timm/{name}"
    try:
        cached = try_to_load_from_cache(repo, "model.safetensors")  # no request where an earlier run fetched it
        weights = Path(cached if isinstance(cached, str) else hf_hub_download(repo, "model.safetensors"))
        revision = weights.parent.name  # the cache keeps snapshots/REVISION/FILE
        config = Path(hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # httpx's, requests' and the hub's own errors share no narrower base
        raise InputError(
            f"--weights: {repo} could not be fetched from {constants.ENDPOINT} ({type(error).__name__}); "
            "check the name and the connection, or give --weights FILE or none"
        ) from error
    return weights, config, f"hub:{repo}@{revision}"
