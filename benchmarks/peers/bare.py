"""The floor: one resident model whose moving parameters lie in one flat vector, a plain loop, a running mean.

python benchmarks/peers/bare.py [--steps_only] [settings]
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import tyro
from task import (
    Meter,
    Settings,
    client_batches,
    client_size,
    freeze,
    loss,
    make_model,
    make_optimizer,
    moving,
    sampled_clients,
)
from torch import Tensor, nn


def main(settings: Annotated[Settings, tyro.conf.arg(name="")], *, steps_only: bool = False) -> None:
    """Print one line of JSON.

    Args:
        steps_only: the same steps, but nothing is loaded or averaged.
    """
    meter = Meter()
    torch.set_num_threads(settings.threads)
    model = make_model(settings)
    freeze(model, settings)
    parameters = list(moving(model).values())
    flat = flatten(parameters)
    theta = flat.clone()
    meter.mark()
    for number in range(1, settings.rounds + 1):
        mean, examples = torch.zeros_like(theta), 0
        for client in sampled_clients(settings, number):
            if not steps_only:
                flat.copy_(theta)
            optimizer = make_optimizer(parameters, settings)
            for pixels, labels in client_batches(settings, client):
                optimizer.zero_grad()
                loss(model, pixels, labels, settings).backward()
                optimizer.step()
            if not steps_only:
                examples += client_size(settings, client)
                mean.lerp_(flat, client_size(settings, client) / examples)
        theta = mean
        meter.mark()
    if not steps_only:
        flat.copy_(theta)
    meter.report(settings, model)


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One vector of all values, into which the parameters look from now on."""
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return flat


if __name__ == "__main__":
    tyro.cli(main)
