"""Rounds of a federated run: how many there are, and how many clients train in one."""

from dataclasses import dataclass

from fedtalos.app.config.schema import ContinualConfig, FederatedConfig, FederationOptions
from fedtalos.training.federated.apart import at_once
from fedtalos.training.federated.client_sampling import clients_per_round


@dataclass(frozen=True)
class Rounds:
    """Rounds of a run, whether all its clients train together, or tasks or single clients apart."""

    total: int
    each: int
    """Rounds of a unit: of a task, of a client that trains by itself, or of all clients."""
    fraction: float
    """Share of a unit's clients that train in a round."""
    clients: int
    """Clients of a round; where units differ in size, those of the largest."""
    at_once: int
    """Clients that could train at once: a round's, or those of all units where each takes one round of all its own."""


def rounds_of(config: FederatedConfig) -> Rounds:
    """Work out a run's rounds from its options.

    >>> config = override(FederatedConfig(), {"tasks": 5, "num_clients": 10, "one_shot": True}, "mine")
    >>> rounds_of(config)
    Rounds(total=5, each=1, fraction=1.0, clients=2, at_once=10)
    """
    federation, options, count = config.federation, config.apart, config.split.num_clients
    each, fraction = (1, 1.0) if options.one_shot else (federation.num_rounds, federation.client_fraction)
    units = units_apart(count, options.tasks, one_shot=options.one_shot)
    passes = 2 if isinstance(config, ContinualConfig) else 1
    left = max(0, units - len(options.leave_out))
    clients = clients_per_round(-(-count // units), fraction)
    return Rounds(passes * each * left, each, fraction, clients, clients * left if at_once(each, fraction) else clients)


def local_epochs(config: FederatedConfig) -> int | None:
    """Passes that a client makes over its images in a round, None: steps; one where it trains once, unless asked.

    >>> local_epochs(override(FederatedConfig(), {"one_shot": True}, "mine"))
    1
    """
    asked, usual = config.federation, FederationOptions()
    unasked = asked.local_epochs is None and asked.local_steps == usual.local_steps
    return 1 if config.apart.one_shot and unasked else asked.local_epochs


def units_apart(num_clients: int, tasks: int | None, *, one_shot: bool) -> int:
    """Count what trains apart: tasks, or with one round single clients; 1 where all clients train together.

    >>> units_apart(20, None, one_shot=True)
    20
    """
    return tasks or (num_clients if one_shot else 1)
