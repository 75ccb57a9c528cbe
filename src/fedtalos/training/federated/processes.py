"""Processes that share the work of a round (torch.distributed): rank 0 leads, the others serve it.

Client number i of a round is trained by rank i mod W (W processes), and the leader takes the results in the clients'
order, whoever made them. So sums are formed in the same order for every W, and with the same number of threads in
every process the result is that of one process, bit for bit. (An all-reduce would send less between more than two
processes, but adds in an order that depends on W.)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

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
        _checked(_order, ("train", number, chosen, controlled))
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
    _checked(_order, ("take",))
    for tensor in named_tensors(moving.model).values():
        _checked(dist.broadcast, tensor, 0)


def evaluate_in_processes(moving: MaskedParameters, evaluate_part: EvaluatePart, split: str) -> Metrics:
    """Sum the metrics of a split, its batches in their order; every process takes a part of them.

    What does not move is to have been sent before, by ``send_model`` or ``in_processes``.
    """
    _checked(_order, ("evaluate", split))
    _checked(dist.broadcast, moving.copy().vector, 0)
    parts: list[Any] = [None] * dist.get_world_size()
    _checked(dist.gather_object, evaluate_part(split, 0, dist.get_world_size()), parts)
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
    within: Engine = one_by_one,
) -> None:
    """Follow the leader's orders until it is gone: what every other rank does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    theta, sent = moving.copy(), moving.copy()
    messages: dict[int, Tensor] = {}
    if algorithm.corrects_gradients:
        within = partial(one_by_one, message=messages.get)
    part = within(moving, clients, local, seed, algorithm)
    try:
        while True:
            match _order(None):
                case ("take",):
                    for tensor in named_tensors(moving.model).values():
                        dist.broadcast(tensor, 0)
                case ("train", number, chosen, controlled):
                    own = chosen[rank::size]
                    dist.broadcast(theta.vector, 0)
                    messages.clear()
                    for client in own if controlled else ():
                        messages[client] = theta.vector.new_empty(len(moving))
                        dist.recv(messages[client], 0)
                    _send_all(part(number, own, theta), sent)
                case ("evaluate", split):
                    dist.broadcast(theta.vector, 0)
                    moving.load(theta)
                    dist.gather_object(evaluate_part(split, rank, size))
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "onnection" not in str(error):
            raise


def _order(order: tuple[object, ...] | None) -> tuple[Any, ...]:
    """The leader's order, at the leader and everywhere else."""
    orders: list[Any] = [order]
    dist.broadcast_object_list(orders, 0, device=torch.device("cpu"))
    out: tuple[Any, ...] = orders[0]
    return out


def _send_all(updates: Iterator[tuple[int, Update | Lost]], sent: Values) -> None:
    """Send each client's update, and reply if any, to the leader, while the next client trains."""
    under_way: list[Any] = []
    for _, update in updates:
        for work in under_way:
            work.wait()
        if isinstance(update, Lost):
            under_way = []
            dist.send(torch.full((3,), torch.nan, dtype=torch.float64), 0)
            dist.send_object_list([(update.why, update.sent)], 0, device=torch.device("cpu"))
            continue
        metrics = update.metrics
        figures = torch.tensor([metrics.loss_sum, metrics.correct, metrics.examples], dtype=torch.float64)
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
        reasons: list[Any] = [None]
        _checked(dist.recv_object_list, reasons, rank, device=torch.device("cpu"))
        return Lost(*reasons[0])
    _checked(dist.recv, received.vector, rank)
    reply = received.vector.new_empty(reply_size) if reply_size else None
    if reply is not None:
        _checked(dist.recv, reply, rank)
    loss_sum, correct, examples = figures.tolist()
    return Update(received.parts, Metrics(loss_sum, int(correct), int(examples)), reply)


def _checked(communicate: Callable[..., object], *arguments: object, **options: object) -> None:
    try:
        communicate(*arguments, **options)
    except RuntimeError as error:
        raise WorkerLostError(f"the work of a round was not shared to its end ({error})") from error
