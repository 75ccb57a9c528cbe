"""Simulated drop-outs and stragglers: which of a round's clients send nothing, a function of seed, round and client."""

from collections.abc import Callable

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Absence


def absence_for(config: FederatedConfig, clients: Clients, steps: Callable[[int], int]) -> Absence:
    """Why a client sends nothing: it holds no image, drops out, or is late with its ``steps``."""
    options, seed = config.failures, config.run.seed

    def absent(number: int, client: int) -> str | None:
        if len(clients[client]) == 0:
            return "no images"
        if options.dropout_rate and generator(seed, "dropouts", number, client).random() < options.dropout_rate:
            return "dropped out"
        if options.deadline is not None and steps(client) * slowness(client) > options.deadline:
            return "late"
        return None

    def slowness(client: int) -> float:
        """How long the client's steps take, 1 for the fastest; log-uniform, the same in every round."""
        return float(options.slowest ** generator(seed, "slowness", client).random())

    return absent
