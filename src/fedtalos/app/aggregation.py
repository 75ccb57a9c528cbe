"""What the options on aggregation mean: who attacks, how updates are clipped and averaged, what is kept private."""

from typing import Any

from torch import nn

from fedtalos.app.config.schema import AggregationOptions, FederatedConfig
from fedtalos.randomness import generator
from fedtalos.training.federated.aggregation import (
    Aggregation,
    Robust,
    RobustRule,
    Rule,
    WeightedMean,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from fedtalos.training.federated.fedavg import TrainClients, clients_per_round
from fedtalos.training.federated.privacy import NoisyMean, epsilon
from fedtalos.training.federated.transforms import attacked, clipped
from fedtalos.training.masked_parameters import Entries

RULES: dict[Rule, RobustRule] = {"median": median, "trimmed_mean": trimmed_mean, "krum": krum, "multi_krum": multi_krum}


def sent_updates(config: FederatedConfig, train_clients: TrainClients) -> TrainClients:
    """``train_clients`` as their updates reach the server: those of attackers changed, long ones clipped."""
    options = config.aggregation
    if options.attack != "none":
        draw = generator(config.run.seed, "attackers")
        attackers = draw.choice(config.split.num_clients, options.attackers, replace=False)
        train_clients = attacked(train_clients, options.attack, frozenset(attackers.tolist()))
    if options.max_update_norm is not None:
        train_clients = clipped(train_clients, options.max_update_norm)
    return train_clients


def aggregation_for(config: FederatedConfig, model: nn.Module, entries: Entries) -> Aggregation:
    """What the server makes of a round's clients."""
    options = config.aggregation
    if options.dp_noise is not None:
        assert options.max_update_norm is not None
        return NoisyMean(
            model, entries, noise_multiplier=options.dp_noise, clip=options.max_update_norm, seed=config.run.seed
        )
    if options.aggregation == "mean":
        return WeightedMean(model, entries)
    return Robust(model, entries, RULES[options.aggregation], clients=_per_round(config), byzantine=options.byzantine)


def privacy(config: FederatedConfig, rounds: int) -> dict[str, Any]:
    """What the summary says of privacy after so many rounds. InputError where the accountant's library is missing."""
    options: AggregationOptions = config.aggregation
    if options.dp_noise is None:
        return {}
    spent = epsilon(
        noise_multiplier=options.dp_noise,
        delta=options.dp_delta,
        clients=config.split.num_clients,
        sampled=_per_round(config),
        rounds=rounds,
    )
    return {
        "privacy": {
            "epsilon": round(spent, 4),
            "delta": options.dp_delta,
            "adjacency": "replace one client",
            "noise_multiplier": options.dp_noise,
            "clip": options.max_update_norm,
        }
    }


def _per_round(config: FederatedConfig) -> int:
    return clients_per_round(config.split.num_clients, config.federation.client_fraction)
