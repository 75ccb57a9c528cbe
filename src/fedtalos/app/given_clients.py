"""Clients that the data name: how many they are is known once the images are read."""

from typing import TypeVar

from fedtalos.app.config.checks_clients import check_clients
from fedtalos.app.config.schema import Config, EditingConfig, FederatedConfig, SplitOptions
from fedtalos.data.dataset_loader import Dataset
from fedtalos.notes import note
from fedtalos.training.federated.partition import given_clients

ConfigT = TypeVar("ConfigT", bound=Config)


def count_given_clients(config: ConfigT, data: Dataset) -> ConfigT:
    """Put the data's own number of clients into ``num_clients`` under partition given, and check what hangs on it.

    Raises InputError where the data name none, or too few for what is asked of them.
    """
    split = _given_split(config)
    if split is None:
        return config
    count = len(given_clients(data.train))
    splits = (data.train, data.calibration, data.val, data.test)
    named = 1 + max(int(s.owners.max()) for s in splits if s.owners is not None and len(s))
    if count < named:
        note(
            "clients left out",
            f"{named - count} of {named}: no images of theirs are trained on; the others are numbered anew",
        )
    counted = config.model_copy(update={"split": split.model_copy(update={"num_clients": count})})
    if isinstance(counted, FederatedConfig | EditingConfig):
        check_clients(counted)
    return counted


def _given_split(config: Config) -> SplitOptions | None:
    """The options of the split, where it is to be the data's own; None where another one, or none, is asked for."""
    if not isinstance(config, FederatedConfig | EditingConfig) or config.split.partition != "given":
        return None
    if isinstance(config, EditingConfig) and config.editing.calibration != "federated":
        return None
    return config.split
