"""From options to the library's objects: local training, algorithm, aggregation, transforms, engine."""

from functools import partial
from typing import Any, TypeVar

from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig, SplitOptions, TrainOptions
from fedtalos.data.class_groups import Groups
from fedtalos.data.images import LabelledImages
from fedtalos.training.federated.aggregation import RULES, WeightedMean, robust
from fedtalos.training.federated.algorithms import ALGORITHMS
from fedtalos.training.federated.client_sampling import clients_per_round
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, MakeAggregation, Transform, one_by_one
from fedtalos.training.federated.partition import split_clients
from fedtalos.training.federated.privacy import epsilon, noisy_mean
from fedtalos.training.federated.processes import Within
from fedtalos.training.federated.stacked import Kept, stacked
from fedtalos.training.federated.tasks import split_by_task
from fedtalos.training.federated.transforms import attacked, clipped, draw_attackers, dropouts, stragglers
from fedtalos.training.local_training import LocalTraining, Watch
from fedtalos.training.schedule import Schedule

T = TypeVar("T")


def local_training(config: CentralizedConfig | FederatedConfig) -> LocalTraining:
    """Resolve the training options to one object, for a client or for the one holder of all images."""
    train = config.train
    steps: dict[str, Any] = {"epochs": 1}
    total = config.num_epochs if isinstance(config, CentralizedConfig) else config.federation.num_rounds
    if isinstance(config, FederatedConfig):
        steps = {"steps": config.federation.local_steps, "epochs": config.federation.local_epochs}
    return LocalTraining(
        **steps,
        batch_size=train.batch_size,
        optimizer=train.optimizer,
        learning_rate=schedule(train, settled(train.learning_rate), total),
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        augmentation="none" if train.augmentation == "auto" else train.augmentation,
        precision=config.run.arithmetic,
    )


def head_training(config: CentralizedConfig | FederatedConfig) -> LocalTraining:
    """Resolve how a linear head is trained before the run: by SGD on plain images, whatever moves the rest.

    AdamW's steps are as large for classes that a client lacks (docs/heads.md).
    """
    train = config.train
    rate = schedule(
        train.model_copy(update={"warmup": 0}), settled(train.head_learning_rate), settled(train.head_rounds)
    )
    return local_training(config).but(optimizer="sgd", learning_rate=rate, augmentation="none")


def schedule(train: TrainOptions, peak: float, total: int) -> Schedule:
    """Learning rate over so many epochs or rounds."""
    return Schedule(peak, total, train.schedule, train.warmup, train.step_every, train.step_gamma, train.final_rate)


def clients_of(images: LabelledImages, options: SplitOptions, seed: int, groups: Groups = ()) -> Clients:
    """Share the training images out as the options say; where there are ``groups``, those of each among its clients."""
    split = partial(split_by_task, groups=groups) if groups else split_clients
    return split(
        images,
        options.num_clients,
        scheme=options.partition,
        seed=seed,
        classes_per_client=options.classes_per_client,
        alpha=options.alpha,
        min_client_size=options.min_client_size,
    )


def algorithm_of(config: FederatedConfig) -> FedAvg:
    """The algorithm that the options name, with its options."""
    options, make = config.algorithm, ALGORITHMS[config.algorithm.algorithm]
    values: dict[str, Any] = {"learning_rate": options.server_learning_rate, "aggregation": aggregation_of(config)}
    match options.algorithm:
        case "fedavg" | "fedprox":
            del values["learning_rate"]
            values |= {"mu": options.prox_mu} if options.algorithm == "fedprox" else {}
        case "fedavgm":
            values["momentum"] = options.server_momentum
        case "fedadagrad":
            values |= {"beta1": options.server_momentum, "tau": options.server_tau}
        case "fedadam" | "fedyogi":
            values |= {"beta1": options.server_momentum, "beta2": options.server_beta2, "tau": options.server_tau}
        case "scaffold":  # made for means, as is fednova
            del values["aggregation"]
        case "fednova":
            values.clear()
    return make(**values)


def aggregation_of(config: FederatedConfig) -> MakeAggregation:
    """Name what the server makes of a round's clients: their mean, a robust rule, or a mean with noise."""
    options = config.aggregation
    if options.dp_noise is not None:
        return noisy_mean(options.dp_noise, settled(options.max_update_norm), config.run.seed)
    if options.aggregation == "mean":
        return WeightedMean
    return robust(RULES[options.aggregation], options.byzantine)


def transforms_of(
    config: FederatedConfig, clients: Clients, local: LocalTraining, seed: int | None = None
) -> list[Transform]:
    """List what happens to updates on their way: stragglers, drop-outs, attacks, clipping.

    ``seed`` (None: the run's) draws whom it happens to.
    """
    failures, options, seed = config.failures, config.aggregation, config.run.seed if seed is None else seed
    through: list[Transform] = []
    if failures.deadline is not None:
        sizes = clients.sizes
        through.append(
            stragglers(failures.deadline, failures.slowest, seed, lambda client: local.steps_for(int(sizes[client])))
        )
    if failures.dropout_rate:
        through.append(dropouts(failures.dropout_rate, seed))
    if options.attack != "none":
        through.append(attacked(options.attack, draw_attackers(len(clients), options.attackers, seed)))
    if options.max_update_norm is not None:
        through.append(clipped(options.max_update_norm))
    return through


def engine_of(config: FederatedConfig, watch: Watch, kept: Kept | None = None) -> Within:
    """Choose how clients train: one by one, or several in one stack, whose steps can be CUDA graphs and compiled.

    Where the engine is asked for anew again and again, ``kept`` has the stacks from one time to the next.
    """
    size, way = config.federation.clients_at_once or 1, config.run.steps
    if size == 1 and way == "off":
        return partial(one_by_one, watch=watch)
    return partial(stacked, size=size, compile=way, watch=watch, kept=kept)


def head_engine_of(config: FederatedConfig, watch: Watch) -> Within:
    """Choose how clients train a linear head alone: on a CPU one by one; what a step is compiled to does not pay."""
    if config.run.steps == "off":
        return partial(one_by_one, watch=watch)
    return partial(stacked, size=config.federation.clients_at_once or 1, compile="graph", watch=watch)


def privacy_spent(config: FederatedConfig) -> dict[str, Any]:
    """Work out what the summary says of privacy after all rounds.

    Raises InputError where the accountant's library is missing.
    """
    options, federation, clients = config.aggregation, config.federation, config.split.num_clients
    if options.dp_noise is None:
        return {}
    count, fraction = clients_per_round(clients, federation.client_fraction), federation.client_fraction
    poisson = federation.client_sampling == "poisson"
    spent = epsilon(
        noise_multiplier=options.dp_noise,
        delta=options.dp_delta,
        clients=clients,
        sampled=fraction * clients if poisson else count,
        rounds=federation.num_rounds,
        sampling=federation.client_sampling,
    )
    sampling = f"poisson, each client with probability {fraction:g}" if poisson else f"uniform, {count} of {clients}"
    return {
        "privacy": {
            "epsilon": round(spent, 4),
            "delta": options.dp_delta,
            "sampling": sampling,
            "adjacency": "add or remove one client" if poisson else "replace one client",
            "noise_multiplier": options.dp_noise,
            "clip": options.max_update_norm,
        }
    }


def settled(value: T | None) -> T:
    """An option's value once ``settle`` has worked out its default."""
    if value is None:
        raise ValueError("an option is not settled yet; see app/config/settle.py")
    return value
