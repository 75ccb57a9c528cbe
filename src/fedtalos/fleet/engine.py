"""Clients on other machines as an engine of ``fedavg``: a round's theta goes out, updates come back, lost nodes do not.

Answers are taken one by one in the clients' order, so sums are formed as in a simulation, and the server's memory holds
one of them, however many clients there are. Those that came early wait where the network keeps them.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from fedtalos.app.config.fleet import Wire
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Arrays, Letter, fact, vector
from fedtalos.fleet.members import Members
from fedtalos.fleet.post import NoAnswer
from fedtalos.fleet.wire import unpack
from fedtalos.metrics import Metrics
from fedtalos.training.entries import Values
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, Updates
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters


def on_nodes(
    moving: MaskedParameters,
    clients: Clients,
    _local: LocalTraining,
    _seed: int,
    algorithm: FedAvg,
    *,
    members: Members,
    wire: Wire = "float32",
) -> Updates:
    """Train a round's clients on their own machines; nodes know local training and seed since they began.

    A client whose node has come since ``clients`` were counted weighs nothing as yet, and is not asked.
    With the wire at float32, and as many threads on every machine, the result is that of a simulation, bit for bit.

    >>> rounds = fedavg(moving, clients, local=local, rounds=10, engine=partial(on_nodes, members=members))
    """

    sizes = clients.sizes

    def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        members.refresh()
        moving.load(theta)
        values = moving.vector().cpu()
        letters = dict[int, Letter]()
        for client in chosen:
            if (member := members.by_client.get(client)) is None or not sizes[client]:
                continue
            arrays: Arrays = {"theta": values.numpy()}
            if (message := algorithm.message(moving, client)) is not None:
                arrays["message"] = message.cpu().numpy()
            letters[client] = Letter("train", {"run": member.run, "round": number, "wire": wire}, arrays)
        answers = members.ask(letters)
        for client in chosen:
            if client not in letters:
                yield client, Lost("no node")
                continue
            _, answer = next(answers)
            if isinstance(answer, NoAnswer):
                yield client, Lost("no answer")
                continue
            if answer.kind in ("refused", "unprepared"):
                yield client, Lost("refused")
                continue
            update = read_update(answer, moving, values, replies=algorithm.vectors_sent > 1)
            if isinstance(update, Lost) and not update.sent:
                members.note(f"round {number}, client {client}: its node says {answer.facts['why']!r}")
            yield client, update

    return updates


def read_update(answer: Letter, moving: MaskedParameters, theta: torch.Tensor, *, replies: bool) -> Update | Lost:
    """Read a node's answer to a round, into the model's own memory; one that cannot be used is lost."""
    try:
        if answer.kind == "lost":
            why, sent = fact(answer, "why", str), fact(answer, "sent", bool)
            return Lost(why, sent=True) if sent else Lost("lost on its node")  # reasons are counted, so they are ours
        if answer.kind != "update":
            raise InputError(f"expected an update, got a letter of kind {answer.kind!r}")
        examples, correct = fact(answer, "examples", int), fact(answer, "correct", int)
        if not 0 <= correct <= examples < 1 << 40:
            raise InputError(f"expected counts of images, got {correct} of {examples}")
        loss_sum = fact(answer, "loss_sum", float)
        reply = torch.from_numpy(vector(answer, "reply", len(moving)).copy()) if replies else None
        if not math.isfinite(loss_sum) or (reply is not None and not bool(reply.isfinite().all())):
            raise InputError("expected a finite loss and a finite reply")
        moving.write(unpack(answer.arrays, theta).to(moving.device))
        metrics = Metrics(loss_sum, correct, examples)
    except InputError as error:
        return Lost(f"{error}; nothing of it was kept", sent=True)
    return Update(moving.rows, metrics, None if reply is None else reply.to(moving.device))
