"""Processes that share the work of a round (torch.distributed): rank 0 leads, the others serve it.

Client number i of a round is trained by rank i mod W (W processes), and the leader takes the results in the clients'
order, whoever made them. So sums are formed in the same order for every W, and with the same number of threads in
every process the result is that of one process, bit for bit. (An all-reduce would send less between more than two
processes, but adds in an order that depends on W.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.training.federated.algorithms.drift import Exchange
from fedtalos.training.federated.fedavg import Outcome, TrainClients
from fedtalos.training.loop import BadUpdateError, TrainingError
from fedtalos.training.masked_parameters import Entries, Values, named_tensors

EvaluatePart = Callable[[str, int, int], list[Metrics]]
"""(split, first, every) -> metrics of each batch first, first + every, ... of that split."""


class WorkerLostError(TrainingError):
    """A process that shares the work is gone; the round that it worked on has no result."""


class Leader:
    """Rank 0: spreads clients, and batches to evaluate, over all processes, itself among them."""

    def __init__(self, model: nn.Module, entries: Entries) -> None:
        """Every process gets all of the model's values; later on, ``entries`` is what moves."""
        tensors = named_tensors(model)
        self._entries = entries
        self._resident = entries.moving_rows(tensors)
        self._received = Values(self._resident)
        _checked(_order, ("take",))
        for tensor in tensors.values():
            _checked(dist.broadcast, tensor, 0)

    def spread(self, train_clients: TrainClients, exchange: Exchange) -> TrainClients:
        """``train_clients`` on every process, for its part of the clients; what ``exchange`` holds for them travels."""
        size = dist.get_world_size()

        def spread_clients(number: int, clients: Sequence[int], theta: Values) -> Iterator[Outcome]:
            controlled = bool(exchange.terms)
            _checked(_order, ("train", number, clients, controlled))
            _checked(dist.broadcast, theta.vector, 0)
            for rank in range(1, size) if controlled else ():
                for client in clients[rank::size]:
                    _checked(dist.send, exchange.terms.pop(client), rank)
            own = train_clients(number, clients[::size], theta)
            for position, client in enumerate(clients):
                rank = position % size
                if rank == 0:
                    yield next(own)
                    continue
                outcome = _receive(rank, self._received)
                if controlled and not isinstance(outcome, BadUpdateError):
                    exchange.gradients[client] = theta.vector.new_empty(len(self._entries))
                    _checked(dist.recv, exchange.gradients[client], rank)
                yield outcome

        return spread_clients

    def evaluate(self, evaluate_part: EvaluatePart, split: str) -> Metrics:
        """Summed metrics of a split, the batches in their order; every process takes a part of them."""
        _checked(_order, ("evaluate", split))
        torch._foreach_copy_(self._received.parts, self._resident)
        _checked(dist.broadcast, self._received.vector, 0)
        parts: list[Any] = [None] * dist.get_world_size()
        _checked(dist.gather_object, evaluate_part(split, 0, dist.get_world_size()), parts)
        batches = (parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts))))
        return sum(batches, Metrics())


def serve(
    model: nn.Module,
    entries: Entries,
    train_clients: TrainClients,
    evaluate_part: EvaluatePart,
    exchange: Exchange,
) -> None:
    """What every other rank does: follow the leader's orders, until it is gone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    resident = entries.moving_rows(named_tensors(model))
    theta, sent = Values(resident), Values(resident)
    try:
        while True:
            match _order(None):
                case ("take",):
                    for tensor in named_tensors(model).values():
                        dist.broadcast(tensor, 0)
                case ("train", number, clients, controlled):
                    own = clients[rank::size]
                    dist.broadcast(theta.vector, 0)
                    for client in own if controlled else ():
                        exchange.terms[client] = theta.vector.new_empty(len(entries))
                        dist.recv(exchange.terms[client], 0)
                    _send_all(own, train_clients(number, own, theta), sent, exchange)
                case ("evaluate", split):
                    dist.broadcast(theta.vector, 0)
                    torch._foreach_copy_(resident, theta.parts)
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


def _send_all(clients: Sequence[int], outcomes: Iterator[Outcome], sent: Values, exchange: Exchange) -> None:
    """Send each client's outcome, and mean gradient if any, to the leader, while the next client trains."""
    under_way: list[Any] = []
    for client, outcome in zip(clients, outcomes, strict=True):
        for work in under_way:
            work.wait()
        gradient = exchange.gradients.pop(client, None)
        if isinstance(outcome, BadUpdateError):
            under_way = []
            dist.send(torch.full((3,), torch.nan, dtype=torch.float64), 0)
            dist.send_object_list([str(outcome)], 0, device=torch.device("cpu"))
            continue
        metrics, values = outcome
        figures = torch.tensor([metrics.loss_sum, metrics.correct, metrics.examples], dtype=torch.float64)
        torch._foreach_copy_(sent.parts, values)
        under_way = [dist.isend(figures, 0), dist.isend(sent.vector, 0)]
        if gradient is not None:
            under_way.append(dist.isend(gradient, 0))
    for work in under_way:
        work.wait()


def _receive(rank: int, received: Values) -> Outcome:
    """The outcome of the client that ``rank`` trained, its values in ``received``.

    Raises WorkerLostError where the process is gone.
    """
    figures = torch.empty(3, dtype=torch.float64)
    _checked(dist.recv, figures, rank)
    if bool(figures.isnan().all()):
        reasons: list[Any] = [None]
        _checked(dist.recv_object_list, reasons, rank, device=torch.device("cpu"))
        return BadUpdateError(reasons[0])
    _checked(dist.recv, received.vector, rank)
    loss_sum, correct, examples = figures.tolist()
    return Metrics(loss_sum, int(correct), int(examples)), received.parts


def _checked(communicate: Callable[..., object], *arguments: object, **options: object) -> None:
    try:
        communicate(*arguments, **options)
    except RuntimeError as error:
        raise WorkerLostError(f"the work of a round was not shared to its end ({error})") from error
