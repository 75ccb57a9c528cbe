"""Options that vectors which train apart leave without effect, or that contradict them."""

import math

from fedtalos.app.config.apart import ApartOptions
from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import AggregationOptions, FederatedConfig
from fedtalos.errors import InputError


def check_apart(config: FederatedConfig) -> None:
    """Refuse what --tasks and --one_shot cannot be given with, with an InputError that says what to do."""
    options, usual = config.apart, ApartOptions()
    values, defaults = flatten(config), flatten(type(config)())
    for name in config.idle:  # in a file; the command line does not know it
        if values[name] != defaults[name]:
            raise InputError(f"--{name}: {config.command} has no use for it; leave it out")
    if not options.asked:
        for name in ("merge", "merge_alpha", "refit_head", "leave_out"):
            if (value := getattr(options, name)) != getattr(usual, name):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                flag = "--no_refit_head" if name == "refit_head" else f"--{name} {shown}"
                raise InputError(f"{flag}: nothing is merged without --tasks or --one_shot; give one, or leave it out")
        return
    asked = "--one_shot" if options.one_shot else "--tasks"
    if options.tasks is not None and config.split.partition == "given":
        raise InputError(
            f"--tasks {options.tasks}: a task has clients of its own, which --partition given does not draw; drop one"
        )
    if options.tasks is not None and options.tasks > config.split.num_clients:
        raise InputError(
            f"--tasks {options.tasks}: every task needs a client, and there are {config.split.num_clients}; "
            "lower it, or raise --num_clients"
        )
    if isinstance(options.merge_alpha, float) and not math.isfinite(options.merge_alpha):
        raise InputError(f"--merge_alpha {options.merge_alpha}: expected a finite number, or auto")
    if config.federation.workers > 1:
        raise InputError(f"--workers {config.federation.workers}: of {asked} one process trains all; leave it out")
    if config.aggregation.aggregation != AggregationOptions().aggregation:
        raise InputError(
            f"--aggregation {config.aggregation.aggregation}: {asked} joins vectors by --merge; leave one of them out"
        )
    if config.aggregation.attack != "none":
        raise InputError(
            f"--attack {config.aggregation.attack}: is of rounds that all clients share, not of {asked}; leave it out"
        )
    if config.aggregation.dp_noise is not None:
        raise InputError(f"--dp_noise {config.aggregation.dp_noise:g}: {asked} sends vectors without noise; drop one")
