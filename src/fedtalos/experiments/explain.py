"""Attention rollout and Grad-CAM over photos, as figures."""

from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fedtalos.app.config.after_training import ExplainConfig
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import say, say_notes
from fedtalos.app.trained import TrainedRun, open_trained
from fedtalos.data.photos import Photos, open_photos
from fedtalos.errors import InputError, nearest
from fedtalos.models.explain import attention_rollout, grad_cam
from fedtalos.training.feature_cache import view_of
from fedtalos.training.prediction import decoded_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 64
"""Images in one call: each is a figure to be looked at."""
SHOWN = 448
"""Pixels a side at which an image is drawn."""


def run(config: ExplainConfig, console: Console) -> None:
    """Draw a figure per image into plots/RUN/; print the files."""
    if not config.images:
        raise InputError("explain: expected images after the run: files, folders, or patterns in quotes")
    trained = open_trained(config.run, config.output_dir, config.which, config.device)
    if config.target is not None and config.target not in trained.classes:
        raise InputError(
            f"target {config.target}: the model has no such class{nearest(config.target, trained.classes)}"
        )
    photos = open_photos(config.images, bar)
    if len(photos) > MOST:
        raise InputError(f"explain: {len(photos)} images are too many figures to look at; give {MOST} at most")
    drawn = figures(trained, photos, config.target)
    say_notes(console)
    from fedtalos.app.figures.draw import write_figures

    for path in write_figures(drawn, config.output_dir / "plots" / trained.name):
        say(console, str(path))


def figures(trained: TrainedRun, photos: Photos, target: str | None) -> dict[str, "Figure"]:
    """Draw each photo, its rollout and its Grad-CAM, by the name of its file."""
    from fedtalos.app.figures.explanation import Explained, explanation

    model, view = trained.model, view_of(trained.model)
    side = max(round(SHOWN / model.crop), decoded_size(model))
    large = torch.cat(list(photos.batches(side, len(photos))))
    drawn: dict[str, Figure] = {}
    pixels = torch.cat(list(photos.batches(decoded_size(model), len(photos))))
    for number, file in enumerate(photos.files):
        images = view(pixels[number : number + 1])
        with torch.no_grad():
            probabilities = model.eval()(images).softmax(1)[0].cpu()
        asked = int(probabilities.argmax()) if target is None else trained.classes.index(target)
        explained = Explained(
            name=file.name,
            pixels=seen(large[number], model.crop).permute(1, 2, 0).numpy(),
            rollout=attention_rollout(model, images)[0].cpu().numpy(),
            cam=grad_cam(model, images, torch.tensor([asked], device=images.device))[0].cpu().numpy(),
            target=trained.classes[asked],
            probability=float(probabilities[asked]),
        )
        drawn[free_name(f"explain_{file.stem}", drawn)] = explanation(explained)
    return drawn


def seen(pixels: torch.Tensor, crop: float) -> torch.Tensor:
    """Cut (3, H, H) to the middle that the model sees."""
    side = round(pixels.shape[-1] * crop)
    start = (pixels.shape[-1] - side) // 2
    return pixels[:, start : start + side, start : start + side]


def free_name(name: str, taken: dict[str, "Figure"]) -> str:
    """Number a name that is taken: files of several folders may be called alike."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
