"""The start of every run of a fleet: its terms, its nodes gathered, and what they are told before their first work."""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from fedtalos.app.config.files import flatten, groups
from fedtalos.app.config.fleet import Wire
from fedtalos.app.config.schema import EditingConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.display import say
from fedtalos.app.run.interruption import safe_point
from fedtalos.fleet.frozen import frozen_part, sha256, shapes_of
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.members import POLL, Members
from fedtalos.fleet.post import Post
from fedtalos.models.weights.checkpoints import model_facts
from fedtalos.training.federated.clients import Clients
from fedtalos.training.masked_parameters import MaskedParameters


@dataclass(frozen=True)
class Terms:
    """Terms between the server and its nodes: seconds to answer in, to gather in, and the numbers on the wire."""

    deadline: float = 600.0
    patience: float = 120.0
    min_nodes: int = 1
    wire: Wire = "float32"


def members_of(config: FederatedConfig | EditingConfig, post: Post, terms: Terms, console: Console) -> Members:
    """The run's nodes, as yet unknown."""

    def pause() -> None:
        safe_point()
        time.sleep(POLL)

    return Members(post, config.split.num_clients, deadline=terms.deadline, note=partial(say, console), pause=pause)


def gather(loaded: Loaded[Any], moving: MaskedParameters, name: str, members: Members, terms: Terms) -> None:
    """Make the nodes ready for the model as it is, those that are not; wait for all, or later for those met before."""
    members.prepare(begin_letter(loaded, moving, name), frozen_part(moving))
    met = int((members.sizes > 0).sum())
    members.gather(terms.patience, terms.min_nodes, wanted=met or None)


def begin_letter(loaded: Loaded[Any], moving: MaskedParameters, run: str) -> Letter:
    """Everything that a node has to know before its first work, but for the frozen part of the model itself."""
    facts, known = model_facts(loaded.model, loaded.data.classes), groups(FederatedConfig)
    return Letter(
        "begin",
        {
            "name": run,
            "options": {name: value for name, value in flatten(loaded.config).items() if name in known},
            "still": sha256(frozen_part(moving)),
            "shapes": shapes_of(moving),
            "model": json.loads(json.dumps({key: value for key, value in facts.items() if key != "classes"})),
            "classes": list(facts["classes"]),
            "data": loaded.data.fingerprint,
        },
    )


def clients_of_sizes(loaded: Loaded[Any], sizes: np.ndarray[Any, np.dtype[np.int64]]) -> Clients:
    """Clients by their numbers of images alone, which is all that the server knows of them."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Clients(loaded.data.train, np.zeros(0, np.int64), offsets)
