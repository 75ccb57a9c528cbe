"""Options that contradict each other, found before anything is loaded."""

from fedtalos.app.config.schema import (
    ADAPTIVE,
    ADJUST_GRADIENTS,
    LOOKS_AT_IMAGES,
    AggregationOptions,
    Algorithm,
    AlgorithmOptions,
    CentralizedConfig,
    EditingConfig,
    EditingOptions,
    FailureOptions,
    FederatedConfig,
    RunConfig,
)
from fedtalos.errors import InputError
from fedtalos.training.federated.aggregation import TooFewError, check_enough
from fedtalos.training.federated.fedavg import clients_per_round

USED_BY: dict[str, tuple[Algorithm, ...]] = {
    "prox_mu": ("fedprox",),
    "server_learning_rate": ("fedavgm", "scaffold", *ADAPTIVE),
    "server_momentum": ("fedavgm", *ADAPTIVE),
    "server_beta2": ("fedadam", "fedyogi"),
    "server_tau": ADAPTIVE,
}


def check_together(config: RunConfig) -> None:
    """Refuse options that contradict each other, with an InputError; to be called once all of them are in."""
    if isinstance(config, EditingConfig):
        _check_editing(config.editing)
        if config.model.head == "linear":
            raise InputError("--head linear: editing fits heads in closed form; use ridge or ncm, or --checkpoint")
        _check_calibration(config.editing, config.split.num_clients)
        return
    if isinstance(config, FederatedConfig):
        _check_federated(config)
        _check_aggregation(config)
        _check_failures(config)
        _check_privacy(config)
    total = config.num_epochs if isinstance(config, CentralizedConfig) else config.federation.num_rounds
    if config.train.warmup >= total:
        raise InputError(f"--warmup {config.train.warmup}: must be below the {total} epochs or rounds of the run")
    for name in ("head_rounds", "head_learning_rate"):
        if getattr(config.train, name) is not None and config.model.head != "linear":
            raise InputError(f"--{name}: trains a linear head; give --head linear too, or leave it out")
    if config.train.mask is None and config.train.force_mask:
        raise InputError("--force_mask: takes a mask made on other weights; give --mask FILE too")
    if config.train.mask is None and config.train.mask_mode == "prune":
        raise InputError("--mask_mode prune: prunes by a mask; give --mask FILE too")
    if config.train.mask is not None and config.train.trainable != "all":
        raise InputError(f"--trainable {config.train.trainable} and --mask both say what may move; give one of them")


def _check_federated(config: FederatedConfig) -> None:
    options, personal = config.algorithm, config.personal
    for knob, users in USED_BY.items():
        value = getattr(options, knob)
        if options.algorithm not in users and value != AlgorithmOptions.model_fields[knob].default:
            raise InputError(f"--{knob} {value:g}: is of --algorithm {' or '.join(users)}; leave it out, or choose one")
    if options.algorithm in ADJUST_GRADIENTS and (config.federation.clients_at_once or 1) > 1:
        raise InputError(
            f"--clients_at_once {config.federation.clients_at_once}: {options.algorithm} adjusts gradients client by "
            "client; leave it out, or take --workers"
        )
    if personal.personalise_clients is not None:
        asked = f"--personalise_clients {personal.personalise_clients}"
        if personal.personalise_steps == 0:
            raise InputError(f"{asked}: says for how many clients; give --personalise_steps too")
        if personal.personalise_clients > config.split.num_clients:
            raise InputError(f"{asked}: there are only {config.split.num_clients} clients; ask for fewer")


def _check_aggregation(config: FederatedConfig) -> None:
    options, algorithm, head = config.aggregation, config.algorithm.algorithm, config.model.head
    rule, clients = options.aggregation, config.split.num_clients
    guards = {"aggregation": "mean", "max_update_norm": None, "attack": "none"}
    asked = [f"--{name} {getattr(options, name)}" for name, off in guards.items() if getattr(options, name) != off]
    if (asked := asked + _failures_asked(config.failures)) and head == "linear":
        raise InputError(f"{asked[0]}: the rounds of --head linear are plain averages; give a head FILE, or random")
    if rule != "mean":
        if algorithm in ("scaffold", "fednova"):
            raise InputError(f"--aggregation {rule}: {algorithm} is made for means; leave out one of them")
        try:
            check_enough(rule, clients_per_round(clients, config.federation.client_fraction), options.byzantine)
        except TooFewError as error:
            raise InputError(f"--aggregation {error}; lower --byzantine, or raise --client_fraction") from error
    if rule in ("mean", "median") and options.byzantine != AggregationOptions.model_fields["byzantine"].default:
        raise InputError(f"--byzantine {options.byzantine}: is of trimmed_mean, krum and multi_krum; leave it out")
    if (options.attack == "none") != (options.attackers == 0):
        raise InputError("--attack and --attackers: say how, and how many, attack; give both, or neither")
    if options.attackers > clients:
        raise InputError(f"--attackers {options.attackers}: there are only {clients} clients; ask for fewer")


def _failures_asked(options: FailureOptions) -> list[str]:
    return [f"--{name} {value}" for name, value in options if value != FailureOptions.model_fields[name].default]


def _check_failures(config: FederatedConfig) -> None:
    options, federation = config.failures, config.federation
    if options.deadline is None:
        if options.slowest != 1:
            raise InputError(f"--slowest {options.slowest:g}: nobody is late for no deadline; give --deadline too")
    elif federation.local_epochs is None and options.deadline < federation.local_steps:
        raise InputError(
            f"--deadline {options.deadline:g}: the fastest client needs --local_steps {federation.local_steps}; "
            "give that or more"
        )


def _check_privacy(config: FederatedConfig) -> None:
    options, algorithm, head = config.aggregation, config.algorithm.algorithm, config.model.head
    clients = config.split.num_clients
    if options.dp_noise is None:
        if options.dp_delta != AggregationOptions.model_fields["dp_delta"].default:
            raise InputError(f"--dp_delta {options.dp_delta:g}: is of differential privacy; give --dp_noise too")
        return
    asked = f"--dp_noise {options.dp_noise:g}"
    if options.max_update_norm is None:
        raise InputError(f"{asked}: hides updates of a norm that is known; give --max_update_norm too")
    if failures := _failures_asked(config.failures):
        raise InputError(f"{asked}: its account is of rounds in which every client counts; leave out {failures[0]}")
    if options.aggregation != "mean":
        raise InputError(f"{asked}: its account is of a mean; leave out --aggregation {options.aggregation}")
    if algorithm in ("scaffold", "fednova"):
        raise InputError(f"{asked}: {algorithm} uses more of a client than its clipped update; take another")
    if head in ("ridge", "ncm"):
        raise InputError(f"{asked}: --head {head} takes sums over clients' images without noise; give a head FILE")
    if options.dp_delta >= 1 / clients:
        raise InputError(f"--dp_delta {options.dp_delta:g}: with {clients} clients it is to be below {1 / clients:g}")


def _check_editing(options: EditingOptions) -> None:
    if options.criterion not in LOOKS_AT_IMAGES and options.calibration == "federated":
        raise InputError(f"--calibration federated: {options.criterion} looks at no images; leave it out")
    if options.fisher == "batch" and options.calibration == "federated":
        raise InputError(
            "--fisher batch: squares sums over batches, which clients do not share; leave out --calibration"
        )
    if options.fisher_samples > 1 and options.fisher != "true":
        raise InputError(
            f"--fisher_samples {options.fisher_samples}: --fisher {options.fisher} draws one label or none"
        )


def _check_calibration(options: EditingOptions, clients: int) -> None:
    for name in ("calibration_clients", "calibration_client"):
        if getattr(options, name) is not None and options.calibration == "central":
            raise InputError(f"--{name}: says which clients score; give --calibration federated too")
    if options.calibration_clients is not None and options.calibration_client is not None:
        raise InputError("--calibration_client and --calibration_clients both say who scores; give one of them")
    if options.calibration_clients is not None and options.calibration_clients > clients:
        raise InputError(
            f"--calibration_clients {options.calibration_clients}: there are only {clients} clients; ask for fewer"
        )
    if options.calibration_client is not None and options.calibration_client >= clients:
        raise InputError(
            f"--calibration_client {options.calibration_client}: the {clients} clients are 0 to {clients - 1}; "
            "choose one of these"
        )
