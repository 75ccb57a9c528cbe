"""Words at the beginning of a run: device, images, clients, model, and what moves and is sent."""

from typing import Any

import torch

from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.split_file import split_title
from fedtalos.app.run.units import megabytes, percent, thousands
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg
from fedtalos.training.masked_parameters import MaskedParameters

Trained = Loaded[CentralizedConfig] | Loaded[FederatedConfig]


def introduction(
    loaded: Trained, moving: MaskedParameters, clients: Clients | None = None, algorithm: FedAvg | None = None
) -> dict[str, str]:
    """Facts that a run begins with, by topic; of ``clients`` and their ``algorithm`` where there are any.

    >>> introduction(loaded, moving)["device"]
    'cpu, fp32, 2 threads'
    """
    facts = {"device": device(loaded), "data": images(loaded)}
    if clients is not None and isinstance(loaded.config, FederatedConfig):
        facts["clients"] = shares(loaded.config, clients)
    facts |= {"model": model(loaded), "moves": moves(loaded, moving), "head": head(loaded, moving)}
    if algorithm is not None and isinstance(loaded.config, FederatedConfig):
        facts["sends"] = sends(loaded.config, moving.nbytes * algorithm.vectors_sent)
    return facts


def introduction_to_edit(loaded: Loaded[EditingConfig], eligible: int, holders: int, scored: int) -> dict[str, str]:
    """Facts that an edit begins with: what it chooses among, and by whose images, of which there are ``scored``."""
    config, options = loaded.config, loaded.config.editing
    share = percent(1 - options.target_sparsity)
    by = f"by {thousands(scored)} calibration images" if options.calibration == "central" else "by clients' images"
    by = by if holders <= 1 else f"by {thousands(scored)} images of {thousands(holders)} clients"
    rounds = f"{options.num_iterations} iteration{'' if options.num_iterations == 1 else 's'}"
    return {
        "device": device(loaded),
        "data": images(loaded),
        "model": model(loaded),
        "head": head_source(config.model.head),
        "mask": f"{share} of {thousands(eligible)} entries, {options.criterion}, {rounds}{', ' + by if scored else ''}",
    }


def device(loaded: Loaded[Any]) -> str:
    """Device, precision, and what shares the work."""
    run, kind = loaded.config.run, loaded.device.type
    name = f"{kind} ({torch.cuda.get_device_name(loaded.device)})" if kind == "cuda" else kind
    threads = torch.get_num_threads()
    workers = loaded.config.federation.workers if isinstance(loaded.config, FederatedConfig) else 1
    shared = f", {workers} processes" if workers > 1 else ""
    return f"{name}, {run.arithmetic}, {threads} thread{'' if threads == 1 else 's'}{shared}"


def images(loaded: Loaded[Any]) -> str:
    """The data set and the sizes of its splits, as far as they are used."""
    data = loaded.data
    sizes = {
        "train": data.train,
        "val": loaded.limited("val"),
        "calibration": data.calibration,
        "test": loaded.limited("test"),
    }
    listed = ", ".join(f"{name} {thousands(len(split))}" for name, split in sizes.items())
    return f"{data.name} ({len(data.classes)} classes): {listed}"


def shares(config: FederatedConfig, clients: Clients) -> str:
    """Number of clients, their split and sizes, and how many train in a round, and for how long."""
    split, federation = config.split, config.federation
    least, most = int(clients.sizes.min()), int(clients.sizes.max())
    size = thousands(least) if least == most else f"{thousands(least)} to {thousands(most)}"
    title = split_title(split.partition, split.classes_per_client, split.alpha)
    count, rounds, tasks = f"{thousands(len(clients))}", rounds_of(config), config.apart.tasks
    drawn = f"about {rounds.clients}" if federation.client_sampling == "poisson" else f"{rounds.clients}"
    many = "step" if federation.local_steps == 1 else "steps"
    work = f"{federation.local_steps} {many} of {config.train.batch_size}"
    if federation.local_epochs is not None:
        passes = "pass" if federation.local_epochs == 1 else "passes"
        work = f"{federation.local_epochs} {passes} over their images"
    if tasks is not None:
        count += f" of {tasks} task{'' if tasks == 1 else 's'}"
    when = "each trains once" if config.apart.one_shot else f"{drawn} in a round"
    return f"{count}, {title}, {size} images each; {when}, {work}"


def model(loaded: Loaded[Any]) -> str:
    """The model, its size, and the weights that it starts from."""
    about, source = loaded.model.architecture, loaded.model.origin.source
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    start = "from scratch" if source == "none" else f"from {source}"
    return f"{about} at {about.image_size} px, {millions(count)} parameters, {start}"


def moves(loaded: Trained, moving: MaskedParameters) -> str:
    """Tell how much of the model moves, and what says so."""
    train, every = loaded.config.train, sum(parameter.numel() for parameter in loaded.model.parameters())
    if len(moving) == every:
        return "everything"
    why = f"--mask {train.mask}" if train.mask is not None else f"--trainable {train.trainable}"
    if train.mask is None and train.trainable == "all":
        why = "--freeze_head"
    return f"{thousands(len(moving))} entries, {percent(len(moving) / every)} ({why})"


def head(loaded: Trained, moving: MaskedParameters) -> str:
    """Tell where the head comes from, and whether it moves."""
    fate = "moves" if "head.weight" in moving.parameters else "stays as it is"
    return f"{head_source(loaded.config.model.head)}; {fate}"


def head_source(option: str) -> str:
    """Tell where the head comes from.

    >>> head_source("ridge")
    'ridge, fitted first'
    """
    known = {"weights": "the weights' own", "random": "random"}
    fitted = {kind: f"{kind}, fitted first" for kind in ("ridge", "ncm", "linear")}
    return (known | fitted).get(option, option)


def sends(config: FederatedConfig, wire: int) -> str:
    """Megabytes of a round, and of the whole run."""
    rounds = rounds_of(config)
    round_ = wire * rounds.clients
    total = megabytes(2 * round_ * rounds.total)
    return f"{megabytes(round_)} down and {megabytes(round_)} up in a round, {total} in all"


def millions(count: int) -> str:
    """Write a number of parameters in millions.

    >>> millions(5_543_716)
    '5.5 million'
    """
    return f"{count / 1e6:.2f} million" if count < 1e6 else f"{count / 1e6:,.1f} million"
