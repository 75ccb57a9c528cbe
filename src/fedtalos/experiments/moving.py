"""What of the model moves, and by which rule: entries, optimiser, learning rate."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from fedtalos.config import TrainOptions
from fedtalos.errors import InputError
from fedtalos.experiments.setup import Setup
from fedtalos.masks import Mask, check_mask, load_mask
from fedtalos.parameters import Entries, named_tensors
from fedtalos.training.local import freeze_all_but, learning_rate_schedule, make_optimizer


def moving_entries(setup: Setup, train: TrainOptions) -> tuple[Entries, Mask | None]:
    """What may move, and the mask that says so, if one does; in prune mode the rest of the mask's tensors is zeroed.

    With a mask: its True entries, and a new head. Without: all, the blocks (and a new head), or the head. Less the
    head under --freeze_head.
    """
    model, mask = setup.model, None
    if train.mask is not None:
        if train.trainable != "all":
            raise InputError(f"--trainable {train.trainable} and --mask both say what may move; give one of them")
        mask, facts = load_mask(train.mask)
        check_mask(train.mask, mask, facts, model, model.architecture.as_dict())
        mask = {name: tensor.to(setup.device) for name, tensor in mask.items()}
        chosen = dict(mask)
    else:
        chosen = {
            name: torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
            for name, parameter in model.named_parameters()
            if train.trainable == "all" or name.startswith(train.trainable)
        }
    for name, parameter in model.head.named_parameters(prefix="head"):
        if train.freeze_head:
            chosen.pop(name, None)
        elif setup.head != "weights":
            chosen[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    if not any(bool(tensor.any()) for tensor in chosen.values()):
        raise InputError("nothing may move: --trainable, --mask and --freeze_head leave no entry; drop one of them")
    entries = Entries(chosen)
    if mask is not None and train.mask_mode == "prune":
        tensors = named_tensors(model)
        for name, tensor in mask.items():
            tensors[name].mul_(tensor)
    return entries, mask


def optimizer_for(setup: Setup, entries: Entries, options: TrainOptions) -> Optimizer:
    """Freeze what may not move, and make the optimiser of what may."""
    freeze_all_but(setup.model, entries)
    assert options.learning_rate is not None
    return make_optimizer(
        setup.model,
        entries,
        rule=options.optimizer,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )


def schedule_for(options: TrainOptions, total: int) -> Callable[[float], float]:
    """Learning rate as a function of epochs or rounds done."""
    assert options.learning_rate is not None
    return learning_rate_schedule(
        options.schedule,
        options.learning_rate,
        total,
        warmup=options.warmup,
        step_every=options.step_every,
        step_gamma=options.step_gamma,
    )
