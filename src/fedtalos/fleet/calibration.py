"""Scores of a mask from clients' own images, on their own machines; both sides of it.

Shapes: E eligible entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtalos.app.config.schema import EditingConfig
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Letter, fact
from fedtalos.fleet.members import Members
from fedtalos.fleet.post import NoAnswer
from fedtalos.fleet.questions import load_theta
from fedtalos.fleet.task import Task
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.sensitivity import Holder, Sensitivity, draw_holders
from fedtalos.training.entries import Entries
from fedtalos.training.masked_parameters import MaskedParameters


def scores_of_client(task: Task, letter: Letter) -> Letter:
    """Score the entries that are still in on the client's own images; the server needs no others."""
    load_theta(task, letter)
    config, clients = task.loaded.config, task.clients
    eligible = eligible_entries(task.loaded.model, fact(letter, "eligible", str))
    bits = letter.arrays.get("kept")
    if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-len(eligible) // 8),):
        raise InputError(f"expected a bit for each of {len(eligible)} eligible entries")
    kept = torch.from_numpy(np.unpackbits(bits, count=len(eligible)).astype(np.bool_)).to(eligible.device)
    holder = Holder(task.client, clients[task.client], clients.images)
    score = Sensitivity(
        task.loaded.model,
        eligible,
        draw_holders([holder], fact(letter, "images", int), config.run.seed),
        soft_zero=fact(letter, "soft_zero", float),
        fisher=fact(letter, "fisher", str),
        fisher_samples=fact(letter, "fisher_samples", int),
        chunk=fact(letter, "fisher_chunk", int),
        batch_size=config.data.eval_batch_size,
        precision=config.run.arithmetic,
        seed=config.run.seed,
    )
    return Letter("scores", {}, {"scores": score(fact(letter, "number", int), kept)[kept].cpu().numpy()})


@dataclass(frozen=True, eq=False)
class ScoresOfNodes:
    """Scores of entries as the sum of what nodes score: a rule for ``refine``, as ``Sensitivity`` is.

    Each of the ``holders`` has a number and a count of images to score. Raises InputError where a node sends no scores:
    a mask is of all who were to score.
    """

    options: EditingConfig
    moving: MaskedParameters
    eligible: Entries
    holders: Sequence[Holder]
    members: Members

    def __call__(self, number: int, kept: Tensor) -> Tensor:
        """Scores (E,) of iteration ``number``, low = keep; those of entries no longer ``kept`` (E,) are 0."""
        editing = self.options.editing
        facts: dict[str, Any] = {
            "number": number,
            **{name: getattr(editing, name) for name in ("eligible", "soft_zero", "fisher", "fisher_samples")},
            "fisher_chunk": editing.fisher_chunk,
        }
        arrays = {"theta": self.moving.vector().cpu().numpy(), "kept": np.packbits(kept.cpu().numpy())}
        letters = {}
        for holder in self.holders:
            if (member := self.members.by_client.get(holder.number)) is None:
                raise InputError(f"client {holder.number} has left, and the mask is to be of all; go on with --resume")
            letters[holder.number] = Letter(
                "score", {**facts, "run": member.run, "images": len(holder.ids)}, dict(arrays)
            )
        total, count = torch.zeros(len(self.eligible), device=self.eligible.device), int(kept.sum())
        for client, answer in self.members.ask(letters):
            if isinstance(answer, NoAnswer) or answer.kind != "scores":
                raise InputError(f"client {client} sent no scores, and the mask is to be of all; go on with --resume")
            scores = answer.arrays.get("scores")
            if scores is None or scores.dtype != np.float32 or scores.shape != (count,):
                raise InputError(f"client {client}: expected {count} scores in float32")
            if not np.isfinite(scores).all() or (scores < 0).any():
                raise InputError(f"client {client}: expected scores that are finite and at least 0")
            total[kept] += torch.from_numpy(np.array(scores)).to(total.device)
        return -total if editing.criterion == "most_sensitive" else total


def refuse_what_asks_no_client(config: EditingConfig) -> None:
    """InputError for options by which no client is asked for scores."""
    if config.editing.calibration != "federated":
        raise InputError("calibration central: looks at no client's images; say `calibration: federated`")
    if config.editing.calibration_client is not None:
        raise InputError("calibration_client: a mask of one client's own is made on its machine; leave it out")
