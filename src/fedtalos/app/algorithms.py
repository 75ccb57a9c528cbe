"""What --algorithm means: the server's part, how clients' gradients are adjusted, what is kept between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtalos.app.config.schema import ADAPTIVE, AlgorithmOptions, FederatedConfig, FederationOptions
from fedtalos.data.batches import steps_per_epoch
from fedtalos.training.federated.algorithms.drift import Exchange, Scaffold, proximal
from fedtalos.training.federated.algorithms.server import (
    NormalisedAveraging,
    ServerAdaptive,
    ServerRule,
    ServerSGD,
    local_progress,
)
from fedtalos.training.federated.clients import Integers
from fedtalos.training.federated.fedavg import TrainClients
from fedtalos.training.loop import Adjust
from fedtalos.training.masked_parameters import Entries

PREFIX = "algorithm/"


@dataclass(frozen=True)
class ServerSide:
    """What an algorithm's server adds to FedAvg's mean, weighted by ``weights`` (K,); ``state`` outlasts a round."""

    weights: NDArray[np.number[Any]]
    state: dict[str, Tensor]
    rule: ServerRule | None = None
    scaffold: Scaffold | None = None

    @property
    def vectors_sent(self) -> int:
        """Vectors of what moves, each way: SCAFFOLD's control variates are as large as the values."""
        return 1 if self.scaffold is None else 2

    def controlled(self, entries: Entries, train_clients: TrainClients) -> TrainClients:
        """``train_clients``, with control variates where there are any."""
        return train_clients if self.scaffold is None else self.scaffold.controlled(entries, train_clients)

    def tensors(self) -> dict[str, Tensor]:
        """The state, as a checkpoint names it."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.state.items()}


def server_side(
    config: FederatedConfig, sizes: Integers, exchange: Exchange, saved: Mapping[str, Tensor], device: torch.device
) -> ServerSide:
    """The server of the config's algorithm for clients of ``sizes`` (K,), its state as a checkpoint saved it."""
    options, state = config.algorithm, _restored(saved, device)
    match options.algorithm:
        case "fedavg" | "fedprox":
            return ServerSide(sizes, state)
        case "fednova":
            momentum = config.train.momentum if config.train.optimizer == "sgd" else 0.0
            steps = [local_steps(config.federation, int(size), config.train.batch_size) for size in sizes]
            nova = NormalisedAveraging(sizes, np.array([local_progress(count, momentum) for count in steps]))
            return ServerSide(nova.weights, state, nova)
    assert options.server_learning_rate is not None
    if options.algorithm == "scaffold":
        rate = options.server_learning_rate
        rule = None if rate == 1 else ServerSGD(state, learning_rate=rate, momentum=0)
        return ServerSide(sizes, state, rule, Scaffold(exchange, sizes, state))
    assert options.server_momentum is not None
    if options.algorithm == "fedavgm":
        momentum = options.server_momentum
        return ServerSide(sizes, state, ServerSGD(state, learning_rate=options.server_learning_rate, momentum=momentum))
    adaptive = ServerAdaptive(
        options.algorithm,
        state,
        learning_rate=options.server_learning_rate,
        beta1=options.server_momentum,
        beta2=options.server_beta2,
        tau=options.server_tau,
    )
    return ServerSide(sizes, state, adaptive)


def _restored(saved: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): t.to(device) for name, t in saved.items() if name.startswith(PREFIX)}


def adjust_for(
    options: AlgorithmOptions, model: nn.Module, entries: Entries, exchange: Exchange, client: int, steps: int
) -> Adjust | None:
    """How the client's gradients are adjusted over its ``steps``; to be asked when the model holds theta."""
    match options.algorithm:
        case "fedprox":
            return proximal(model, entries, options.prox_mu)
        case "scaffold":
            return exchange.adjust(client, steps)
        case _:
            return None


def settled(options: AlgorithmOptions) -> AlgorithmOptions:
    """The options with the defaults of their algorithm, where it has any."""
    name, values = options.algorithm, {}
    if name in ("fedavgm", "scaffold", *ADAPTIVE) and options.server_learning_rate is None:
        values["server_learning_rate"] = 1e-3 if name in ADAPTIVE else 1.0
    if name in ("fedavgm", *ADAPTIVE) and options.server_momentum is None:
        values["server_momentum"] = 0.0 if name == "fedadagrad" else 0.9
    return options.model_copy(update=values)


def local_steps(federation: FederationOptions, examples: int, batch_size: int) -> int:
    """J: as given, or as many as ``local_epochs`` passes take."""
    if federation.local_epochs is None:
        return federation.local_steps
    return federation.local_epochs * steps_per_epoch(examples, batch_size)
