"""Make vit_micro.json: the logits that timm's VisionTransformer gives for weights and images written out below.

python tests/golden/make_vit_golden.py        (needs timm 1.0 and what it imports; fedtalos is not used)
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("vit_micro.json")
CLASSES, PATCH = 10, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DINOv2": {"init_values": 1e-5},
    "DINOv2 with registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
}
IMAGE_SIZES = (32, 24, 48)  # the weights' own, then smaller and larger: the position embedding is resampled


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float32 of mean 0 and deviation 1, from integers only (no generator whose stream could change)."""
    count = torch.Size(shape).numel()
    x = (torch.arange(count) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    x = (x ^ (x >> 15)) * 739982445 % 2**32
    x = (x ^ (x >> 12)) * 695872825 % 2**32
    uniform = (x ^ (x >> 15)).double() / 2**32 - 0.5
    return (uniform * 12**0.5).float().reshape(shape)


def written_out_weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Weights that let every term of the model show in the logits.

    Attention is far from uniform; tokens enter the first block near 0.05, as trained ones do, so that the
    norm's epsilon counts too.
    """
    weights = {}
    for name, shape in shapes.items():
        if "norm" in name:
            weights[name] = 0.3 * noise(name, shape) + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight"):
            weights[name] = noise(name, shape) / shape[1:].numel() ** 0.5
        else:
            weights[name] = 0.5 * noise(name, shape)
        if not name.startswith(("blocks.", "norm.", "head.")):
            weights[name] *= 0.05
    return weights


def images(size: int) -> Tensor:
    """Two images, (2, 3, size, size)."""
    return noise(f"images {size}", (2, 3, size, size))


def main() -> None:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    logits: dict[str, dict[str, list[list[float]]]] = {variant: {} for variant in VARIANTS}
    for variant, options in VARIANTS.items():
        for size in IMAGE_SIZES:
            model = VisionTransformer(
                img_size=IMAGE_SIZES[0],
                patch_size=PATCH,
                embed_dim=96,
                depth=6,
                num_heads=3,
                num_classes=CLASSES,
                **options,
            ).eval()
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            model.load_state_dict(written_out_weights(shapes))
            model.set_input_size(img_size=(size, size))
            with torch.no_grad():
                logits[variant][str(size)] = model(images(size)).tolist()
    golden = {"timm": timm.__version__, "torch": torch.__version__, "logits": logits}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
