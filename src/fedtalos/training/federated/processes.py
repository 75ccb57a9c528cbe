"""Processes that share the work of a round (torch.distributed): rank 0 leads, the others serve it.

Client number i of a round is trained by rank i mod W (W processes), and the leader takes the results in the clients'
order, whoever made them. So sums are formed in the same order for every W, and with the same number of threads in
every process the result is that of one process, bit for bit. (An all-reduce would send less between more than two
processes, but adds in an order that depends on W.)

Messages are tensors and JSON. Nothing is pickled.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fedtalos.errors import TrainingError
from fedtalos.metrics import Metrics
from fedtalos.training.entries import Values, named_tensors
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Engine, FedAvg, Lost, Update, Updates, one_by_one
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

EvaluatePart = Callable[[str, int, int], list[Metrics]]
"""(split, first, every) -> metrics of each batch first, first + every, ... of that split."""

LONGEST = 2**28
"""Most bytes of JSON in a message: the numbers of some 30 million clients."""


class Within(Protocol):
    """An engine that trains clients in one process, with another's messages to them in place of its algorithm's."""

    def __call__(
        self,
        moving: MaskedParameters,
        clients: Clients,
        local: LocalTraining,
        seed: int,
        algorithm: FedAvg,
        *,
        message: Callable[[int], Tensor | None] | None = None,
    ) -> Updates: ...


class WorkerLostError(TrainingError):
    """A process that shares the work is gone; the round that it worked on has no result."""


def in_processes(
    moving: MaskedParameters,
    clients: Clients,
    local: LocalTraining,
    seed: int,
    algorithm: FedAvg,
    *,
    within: Engine = one_by_one,
) -> Updates:
    """Train a round's clients on all processes of the group, this one among them; to be called by rank 0.

    The others are in ``serve``, and get all of the model's values now. ``within`` is how each process trains its part
    of the clients.
    """
    send_model(moving)
    size, received = dist.get_world_size(), moving.copy()
    part = within(moving, clients, local, seed, algorithm)

    def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        messages = {client: algorithm.message(moving, client) for client in chosen}
        controlled = any(message is not None for message in messages.values())
        _checked(_order, ["train", number, [*map(int, chosen)], controlled])
        _checked(dist.broadcast, theta.vector, 0)
        for rank in range(1, size) if controlled else ():
            for client in chosen[rank::size]:
                _checked(dist.send, messages[client], rank)
        own = part(number, chosen[::size], theta)
        for position, client in enumerate(chosen):
            rank = position % size
            yield next(own) if rank == 0 else (client, _receive(rank, received, len(moving) if controlled else 0))

    return updates


def send_model(moving: MaskedParameters) -> None:
    """Give all of the model's values to the other processes, which are in ``serve``; later on, only what moves."""
    _checked(_order, ["take"])
    for tensor in named_tensors(moving.model).values():
        _checked(dist.broadcast, tensor, 0)


def evaluate_in_processes(moving: MaskedParameters, evaluate_part: EvaluatePart, split: str) -> Metrics:
    """Sum the metrics of a split, its batches in their order; every process takes a part of them.

    What does not move is to have been sent before, by ``send_model`` or ``in_processes``.
    """
    _checked(_order, ["evaluate", split])
    _checked(dist.broadcast, moving.copy().vector, 0)
    size = dist.get_world_size()
    parts = [evaluate_part(split, 0, size), *(_receive_metrics(rank) for rank in range(1, size))]
    batches = (parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts))))
    return sum(batches, Metrics())


def serve(
    moving: MaskedParameters,
    clients: Clients,
    local: LocalTraining,
    seed: int,
    algorithm: FedAvg,
    evaluate_part: EvaluatePart,
    *,
    within: Within = one_by_one,
) -> None:
    """Follow the leader's orders until it is gone: what every other rank does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    theta, sent = moving.copy(), moving.copy()
    messages: dict[int, Tensor] = {}
    part = within(moving, clients, local, seed, algorithm, message=messages.get)
    try:
        while True:
            match _order(None):
                case ["take"]:
                    for tensor in named_tensors(moving.model).values():
                        dist.broadcast(tensor, 0)
                case ["train", number, chosen, controlled]:
                    own = chosen[rank::size]
                    dist.broadcast(theta.vector, 0)
                    messages.clear()
                    for client in own if controlled else ():
                        messages[client] = theta.vector.new_empty(len(moving))
                        dist.recv(messages[client], 0)
                    _send_all(part(number, own, theta), sent)
                case ["evaluate", split]:
                    dist.broadcast(theta.vector, 0)
                    moving.load(theta)
                    _send_metrics(evaluate_part(split, rank, size))
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "onnection" not in str(error):
            raise


def _order(order: list[object] | None) -> list[Any]:
    """The leader's order, at the leader and everywhere else."""
    return _words(order, lambda tensor: dist.broadcast(tensor, 0))


def _words(words: list[object] | None, share: Callable[[Tensor], object]) -> list[Any]:
    """JSON through ``share``, which sends or receives a tensor: here it is to be sent unless it is None.

    Raises TrainingError where more is announced than anybody sends.
    """
    content = b"" if words is None else json.dumps(words).encode()
    length = torch.tensor([len(content)])
    share(length)
    if not 0 < (count := int(length)) <= LONGEST:
        raise TrainingError(f"another process announced a message of {count} bytes; end the run's processes")
    tensor = torch.frombuffer(bytearray(content or count), dtype=torch.uint8)
    share(tensor)
    out: list[Any] = json.loads(tensor.numpy().tobytes())
    return out


def _send_metrics(metrics: Sequence[Metrics]) -> None:
    """Send the metrics of each batch to the leader, (B, 3), after their number B."""
    dist.send(torch.tensor([len(metrics)]), 0)
    if metrics:
        dist.send(torch.stack([_figures(of_batch) for of_batch in metrics]), 0)


def _receive_metrics(rank: int) -> list[Metrics]:
    """Metrics of each batch that ``rank`` evaluated; WorkerLostError where the process is gone."""
    count = torch.tensor([0])
    _checked(dist.recv, count, rank)
    figures = torch.empty(int(count), 3, dtype=torch.float64)
    if len(figures):
        _checked(dist.recv, figures, rank)
    return [_metrics(of_batch) for of_batch in figures]


def _figures(metrics: Metrics) -> Tensor:
    return torch.tensor([metrics.loss_sum, metrics.correct, metrics.examples], dtype=torch.float64)


def _metrics(figures: Tensor) -> Metrics:
    loss_sum, correct, examples = figures.tolist()
    return Metrics(loss_sum, int(correct), int(examples))


def _send_all(updates: Iterator[tuple[int, Update | Lost]], sent: Values) -> None:
    """Send each client's update, and reply if any, to the leader, while the next client trains."""
    under_way: list[Any] = []
    for _, update in updates:
        for work in under_way:
            work.wait()
        if isinstance(update, Lost):
            under_way = []
            dist.send(torch.full((3,), torch.nan, dtype=torch.float64), 0)
            _words([update.why, update.sent], lambda tensor: dist.send(tensor, 0))
            continue
        figures = _figures(update.metrics)
        torch._foreach_copy_(sent.parts, update.values)
        under_way = [dist.isend(figures, 0), dist.isend(sent.vector, 0)]
        if update.reply is not None:
            under_way.append(dist.isend(update.reply, 0))
    for work in under_way:
        work.wait()


def _receive(rank: int, received: Values, reply_size: int) -> Update | Lost:
    """The update of the client that ``rank`` trained, its values in ``received``.

    Raises WorkerLostError where the process is gone.
    """
    figures = torch.empty(3, dtype=torch.float64)
    _checked(dist.recv, figures, rank)
    if bool(figures.isnan().all()):
        why, sent = _words(None, lambda tensor: _checked(dist.recv, tensor, rank))
        return Lost(why, sent)
    _checked(dist.recv, received.vector, rank)
    reply = received.vector.new_empty(reply_size) if reply_size else None
    if reply is not None:
        _checked(dist.recv, reply, rank)
    return Update(received.parts, _metrics(figures), reply)


def _checked(communicate: Callable[..., object], *arguments: object, **options: object) -> None:
    try:
        communicate(*arguments, **options)
    except RuntimeError as error:
        raise WorkerLostError(f"the work of a round was not shared to its end ({error})") from error
