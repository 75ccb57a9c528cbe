"""The option --dataset: a name that is known, or one of the Hugging Face hub."""

from typing import Annotated, get_args

from pydantic import AfterValidator

from fedtalos.data.dataset_loader import DatasetName
from fedtalos.data.hub_dataset import HUB, place_of
from fedtalos.errors import InputError, shown


def known_dataset(name: str) -> str:
    """Check the name of a data set; InputError for one that is not known.

    >>> known_dataset("hf:ylecun/mnist")
    'hf:ylecun/mnist'
    """
    if name in get_args(DatasetName) or (name.startswith(HUB) and place_of(name)[0]):
        return name
    raise InputError(f"dataset {shown(name)}: expected one of {', '.join(get_args(DatasetName))}, or {HUB}OWNER/NAME")


Dataset = Annotated[DatasetName | str, AfterValidator(known_dataset)]
"""Name of a data set, as an option takes it."""
