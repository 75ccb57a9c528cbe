"""Options that contradict each other or have no effect, found before anything is loaded."""

from collections.abc import Collection, Mapping

from fedtalos.app.config.checks_apart import check_apart
from fedtalos.app.config.checks_clients import check_clients
from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import (
    ADAPTIVE,
    LOOKS_AT_IMAGES,
    CentralizedConfig,
    EditingConfig,
    EditingOptions,
    FailureOptions,
    FederatedConfig,
    RunConfig,
)
from fedtalos.errors import InputError


class _Given:
    """Stands for any value but none, no and zero, in USED_WHEN."""


GIVEN = _Given()
Condition = tuple[str, tuple[object, ...]]
"""(another option, values of it): the option is used where the other has one of them."""

OF_CLIENTS: Condition = ("calibration", ("federated",))  # of editing; other commands have no such option
BY_IMAGES: Condition = ("criterion", LOOKS_AT_IMAGES)
USED_WHEN: dict[str, tuple[Condition, ...]] = {
    "weights": (("checkpoint", (None,)),),
    "force_mask": (("mask", (GIVEN,)),),
    "mask_mode": (("mask", (GIVEN,)),),
    "save_vector": (("tasks", (None,)), ("one_shot", (False,))),
    "momentum": (("optimizer", ("sgd",)),),
    "step_every": (("schedule", ("step",)),),
    "step_gamma": (("schedule", ("step",)),),
    "final_rate": (("schedule", ("cosine",)),),
    "head_rounds": (("head", ("linear",)),),
    "head_learning_rate": (("head", ("linear",)),),
    "num_clients": (OF_CLIENTS, ("partition", ("iid", "label_skew", "dirichlet", "quantity"))),
    "partition": (OF_CLIENTS,),
    "classes_per_client": (OF_CLIENTS, ("partition", ("label_skew",))),
    "alpha": (OF_CLIENTS, ("partition", ("dirichlet", "quantity"))),
    "min_client_size": (OF_CLIENTS, ("partition", ("dirichlet", "quantity"))),
    "local_steps": (("local_epochs", (None,)),),
    "num_rounds": (("one_shot", (False,)),),
    "client_fraction": (("one_shot", (False,)),),
    "client_sampling": (("one_shot", (False,)),),
    "warmup": (("one_shot", (False,)),),
    "task_order": (("tasks", (GIVEN,)),),
    "local_classes": (("tasks", (GIVEN,)),),
    "prox_mu": (("algorithm", ("fedprox",)),),
    "server_learning_rate": (("algorithm", ("fedavgm", "scaffold", *ADAPTIVE)),),
    "server_momentum": (("algorithm", ("fedavgm", *ADAPTIVE)),),
    "server_beta2": (("algorithm", ("fedadam", "fedyogi")),),
    "server_tau": (("algorithm", ADAPTIVE),),
    "byzantine": (("aggregation", ("trimmed_mean", "krum", "multi_krum")),),
    "dp_delta": (("dp_noise", (GIVEN,)),),
    "slowest": (("deadline", (GIVEN,)),),
    "personalise_clients": (("personalise_steps", (GIVEN,)),),
    "personalise_alpha": (("personalise_steps", (GIVEN,)),),
    "soft_zero": (BY_IMAGES,),
    "fisher": (BY_IMAGES,),
    "fisher_samples": (BY_IMAGES, ("fisher", ("true",))),
    "fisher_chunk": (BY_IMAGES,),
    "calibration_images": (BY_IMAGES,),
    "calibration_clients": (OF_CLIENTS,),
    "calibration_client": (OF_CLIENTS,),
}
"""Conditions under which an option has an effect; one that is not here always has.

Left out on purpose: places (--data_dir) and which images there are (--train_limit), so that several commands and data
sets can be given the same ones.
"""


def check_together(config: RunConfig, given: Collection[str] | None = None) -> None:
    """Refuse options that contradict each other, or have no effect, with an InputError; once all of them are in.

    Only the ``given`` ones (None: all) are refused for having no effect: a file, or a grid, may serve several runs.
    """
    if config.run.resume and config.run.resume_or_start:
        raise InputError("--resume and --resume_or_start both say how to go on; give one of them")
    check_used(config, given)
    if isinstance(config, EditingConfig):
        _check_editing(config.editing)
        if config.model.head == "linear":
            raise InputError("--head linear: editing fits heads in closed form; use ridge or ncm, or --checkpoint")
        _check_calibration(config)
        return
    if isinstance(config, FederatedConfig):
        check_apart(config)
        _check_aggregation(config)
        _check_failures(config)
        _check_privacy(config)
        if config.split.partition != "given":  # else once the data are read
            check_clients(config)
    total = config.num_epochs if isinstance(config, CentralizedConfig) else config.federation.num_rounds
    if config.train.warmup >= total:
        raise InputError(f"--warmup {config.train.warmup}: must be below the {total} epochs or rounds of the run")
    apart = isinstance(config, FederatedConfig) and config.apart.asked
    if config.train.early_stop is not None and apart:
        raise InputError(
            f"--early_stop {config.train.early_stop}: what trains apart is validated when it is merged; leave it out"
        )
    if config.train.train_head and (config.train.freeze_head or config.train.mask is None):
        raise InputError("--train_head: lets a fitted head move under a mask; give --mask FILE, without --freeze_head")
    if config.train.mask is not None and config.train.trainable != "all":
        raise InputError(f"--trainable {config.train.trainable} and --mask both say what may move; give one of them")


def check_used(config: RunConfig, given: Collection[str] | None = None) -> None:
    """Refuse options that have no effect beside the others, with an InputError that says what they are of.

    An option at its default is nobody's wish.
    """
    values, defaults = flatten(config), flatten(type(config)())
    for option, conditions in USED_WHEN.items():
        if option not in values or values[option] == defaults[option] or (given is not None and option not in given):
            continue
        for other, wanted in conditions:
            now = values.get(other)
            if other not in values or now in wanted or (GIVEN in wanted and now):
                continue
            if GIVEN in wanted:
                raise InputError(
                    f"{_asked(option, values)}: has no effect without --{other}; give --{other} too, or leave it out"
                )
            if wanted in ((None,), (False,)):
                raise InputError(f"{_asked(option, values)} and {_asked(other, values)}: one of them is used; give one")
            of = f"--{other} {' or '.join(map(str, wanted))}"
            mend = f"give {of} too" if len(wanted) == 1 else "choose one of these"
            raise InputError(f"{_asked(option, values)}: is of {of}, not of {now}; {mend}, or leave it out")


def _asked(option: str, values: Mapping[str, object]) -> str:
    """An option as it is written."""
    value = values[option]
    if value is True:
        return f"--{option}"
    return f"--{option} {value:g}" if isinstance(value, float) else f"--{option} {value}"


def _check_aggregation(config: FederatedConfig) -> None:
    options, algorithm, head = config.aggregation, config.algorithm.algorithm, config.model.head
    rule = options.aggregation
    guards = {"aggregation": "mean", "max_update_norm": None, "attack": "none"}
    asked = [f"--{name} {getattr(options, name)}" for name, off in guards.items() if getattr(options, name) != off]
    if (asked := asked + _failures_asked(config.failures)) and head == "linear":
        raise InputError(f"{asked[0]}: the rounds of --head linear are plain averages; give a head FILE, or random")
    if rule != "mean":
        if config.federation.client_sampling == "poisson":
            raise InputError(
                f"--client_sampling poisson: --aggregation {rule} needs a fixed number of clients; drop one"
            )
        if algorithm in ("scaffold", "fednova"):
            raise InputError(f"--aggregation {rule}: {algorithm} is made for means; leave out one of them")
    if (options.attack == "none") != (options.attackers == 0):
        raise InputError("--attack and --attackers: say how, and how many, attack; give both, or neither")


def _failures_asked(options: FailureOptions) -> list[str]:
    return [f"--{name} {value}" for name, value in options if value != FailureOptions.model_fields[name].default]


def _check_failures(config: FederatedConfig) -> None:
    options, federation = config.failures, config.federation
    if options.deadline is None or federation.local_epochs is not None:
        return
    if options.deadline < federation.local_steps:
        raise InputError(
            f"--deadline {options.deadline:g}: the fastest client needs --local_steps {federation.local_steps}; "
            "give that or more"
        )


def _check_privacy(config: FederatedConfig) -> None:
    options, algorithm, head = config.aggregation, config.algorithm.algorithm, config.model.head
    if options.dp_noise is None:
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


def _check_editing(options: EditingOptions) -> None:
    if options.criterion not in LOOKS_AT_IMAGES and options.calibration == "federated":
        raise InputError(f"--calibration federated: {options.criterion} looks at no images; leave it out")
    if options.fisher == "batch" and options.calibration == "federated":
        raise InputError(
            "--fisher batch: squares sums over batches, which clients do not share; leave out --calibration"
        )


def _check_calibration(config: EditingConfig) -> None:
    options = config.editing
    if options.calibration_clients is not None and options.calibration_client is not None:
        raise InputError("--calibration_client and --calibration_clients both say who scores; give one of them")
    if config.split.partition != "given":
        check_clients(config)
