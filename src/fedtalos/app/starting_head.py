"""The head that a run starts with: as asked, the weights' own, or the one that belongs to the mask."""

from pathlib import Path
from typing import TypeVar, cast

from fedtalos.app.config.schema import CentralizedConfig, Config, EditingConfig, FederatedConfig
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import HEADS
from fedtalos.notes import note
from fedtalos.training.editing.mask_facts import MaskFacts
from fedtalos.training.entries import Mask

ConfigT = TypeVar("ConfigT", bound=Config)


def choose_head(config: Config, model: Backbone, mask: tuple[Mask, MaskFacts] | None) -> str:
    """Settle which head the run is to have: as asked, or the weights' own, or the one that belongs to the mask.

    A mask is made through a head; with another head its entries are not the least sensitive ones. Raises InputError
    where the mask's head is not at hand.
    """
    if config.model.head != "auto":
        return config.model.head
    if model.head_source != "random":
        return model.head_source
    if isinstance(config, EditingConfig):
        return "ridge"  # scores through an untrained head would mean nothing
    if mask is None or not isinstance(config, CentralizedConfig | FederatedConfig) or config.train.mask is None:
        return "ridge" if _trains_apart(config) else "random"
    made_through, path = mask[1].head, head_of_mask(config.train.mask)
    if path.is_file():
        note("head", f"the head that {config.train.mask} was made through: {path}")
        return str(path)
    if made_through in ("random", "none"):
        return "random"
    anew = f"--head {made_through} to fit it anew" if made_through in HEADS else "--head FILE"
    raise InputError(
        f"--mask {config.train.mask}: made through a head ({made_through}) that is not at hand: there is no {path}; "
        f"give {anew}, or --head random for a new one"
    )


def head_of_mask(mask: Path) -> Path:
    """Path of the head file that editing writes beside a mask file."""
    return mask.with_name(f"{mask.name.removesuffix('.safetensors')}.head.safetensors")


def _trains_apart(config: Config) -> bool:
    """Tell whether clients, or tasks, train apart: their vectors add up through one head."""
    return isinstance(config, FederatedConfig) and config.apart.asked


def freeze_fitted_head(config: ConfigT, mask: tuple[Mask, MaskFacts] | None) -> ConfigT:
    """Keep a fitted head as it is under a mask, unless --train_head: moving it loses what the fit had gained."""
    if not isinstance(config, CentralizedConfig | FederatedConfig) or (mask is None and not _trains_apart(config)):
        return config
    train = config.train
    moves = ("random",) if mask is None else ("weights", "random")  # vectors that train apart share every other head
    if train.train_head or train.freeze_head or config.model.head in moves:
        return config
    if mask is None:
        note("frozen head", "the fitted head stays as it is, for vectors that train apart to share it")
    else:
        note("frozen head", "the fitted head stays as it is under the mask; --train_head lets it move")
    frozen: Config = config.model_copy(update={"train": train.model_copy(update={"freeze_head": True})})
    return cast(ConfigT, frozen)
