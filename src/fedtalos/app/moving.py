"""Entries of the model that move in a training run, and the model paired with it."""

from dataclasses import replace

import torch

from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.eligible import eligible_masks
from fedtalos.training.editing.mask_facts import MaskFacts, fingerprint
from fedtalos.training.entries import Mask, named_tensors
from fedtalos.training.masked_parameters import MaskedParameters


def what_moves(loaded: Loaded[CentralizedConfig] | Loaded[FederatedConfig]) -> Mask:
    """A mask of what the options let move; in prune mode the entries that the mask file excluded become zero.

    With a mask file: its True entries, and a new head. Without: everything, the blocks (and a new head), or the head.
    Less the head under --freeze_head. Raises InputError where nothing may move.
    """
    model, train = loaded.model, loaded.config.train
    if loaded.mask is not None and train.mask is not None:
        chosen = dict(loaded.mask[0])
    else:
        chosen = {
            name: torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
            for name, parameter in model.named_parameters()
            if train.trainable == "all" or name.startswith(train.trainable)
        }
        if not chosen:
            raise InputError(f"--trainable {train.trainable}: {model.architecture} has none; give all or head")
    for name, parameter in model.head.named_parameters(prefix="head"):
        if train.freeze_head:
            chosen.pop(name, None)
        elif loaded.config.model.head != "weights":
            chosen[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    if not any(bool(tensor.any()) for tensor in chosen.values()):
        raise InputError("nothing may move: --trainable, --mask and --freeze_head leave no entry; drop one of them")
    if loaded.mask is not None and train.mask_mode == "prune":
        _prune(model, *loaded.mask)
    return chosen


def moving_parameters(loaded: Loaded[CentralizedConfig] | Loaded[FederatedConfig]) -> MaskedParameters:
    """Pair the model with what the options let move of it, and freeze the rest."""
    return MaskedParameters(loaded.model, what_moves(loaded), features=loaded.features)


def _prune(model: Backbone, mask: Mask, facts: MaskFacts) -> None:
    """Set the entries to zero that the mask could have let move and did not; vectors of it are of no other model."""
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, facts.eligible_in)
    tensors = named_tensors(model)
    for name, tensor in mask.items():
        tensors[name].masked_fill_((eligible[name] & ~tensor).to(tensors[name].device), 0)
    model.origin = replace(model.origin, fingerprint=f"{model.origin.fingerprint}, pruned by {fingerprint(mask)}")
