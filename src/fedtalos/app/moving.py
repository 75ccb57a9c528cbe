"""What of the model moves, and by which rule: entries, optimiser, learning rate."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedtalos.app.config.schema import TrainOptions
from fedtalos.app.setup import Setup
from fedtalos.errors import InputError
from fedtalos.training.editing.mask_file import check_mask
from fedtalos.training.editing.talos import eligible_masks
from fedtalos.training.loop import learning_rate_schedule, make_optimizer
from fedtalos.training.masked_parameters import Entries, named_tensors


def moving_entries(setup: Setup, train: TrainOptions) -> Entries:
    """What may move; in prune mode the entries that the mask excluded are zeroed.

    With a mask: its True entries, and a new head. Without: all, the blocks (and a new head), or the head. Less the
    head under --freeze_head. Raises InputError for a mask of another model, or unless forced of other weights.
    """
    model = setup.model
    if setup.mask is not None and train.mask is not None:
        loaded, facts = setup.mask
        architecture = model.architecture.as_dict()
        check_mask(
            train.mask, loaded, facts, model, architecture=architecture, weights=setup.weights, force=train.force_mask
        )
        chosen = {name: tensor.to(setup.device) for name, tensor in loaded.items()}
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
        elif setup.head != "weights":
            chosen[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    if not any(bool(tensor.any()) for tensor in chosen.values()):
        raise InputError("nothing may move: --trainable, --mask and --freeze_head leave no entry; drop one of them")
    entries = Entries(chosen)
    if train.mask_mode == "prune":
        tensors = named_tensors(model)
        for name, frozen in frozen_entries(setup).items():
            tensors[name].masked_fill_(frozen, 0)
    return entries


def frozen_entries(setup: Setup) -> dict[str, Tensor]:
    """By tensor name, the entries that the mask could have let move and did not."""
    if setup.mask is None:
        return {}
    mask, facts = setup.mask
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, facts.eligible_in)
    return {name: (eligible[name] & ~tensor).to(setup.device) for name, tensor in mask.items()}


def optimizer_for(setup: Setup, entries: Entries, options: TrainOptions) -> Optimizer:
    """Freeze what may not move, and make the optimiser of what may."""
    setup.let_move(entries)
    return optimizer_of(options, dict(setup.model.named_parameters()), entries)


def optimizer_of(options: TrainOptions, parameters: Mapping[str, nn.Parameter], entries: Entries) -> Optimizer:
    """The optimiser that the options describe, of entries of the named parameters."""
    assert options.learning_rate is not None
    return make_optimizer(
        parameters,
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
