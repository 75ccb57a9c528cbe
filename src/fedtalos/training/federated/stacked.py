"""Clients of a round trained in one stack, for devices that one client's batch does not fill.

Letters: V clients that train together, A entries that move.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from fedtalos.data.batches import batch_sizes
from fedtalos.devices import out_of_memory
from fedtalos.errors import BadUpdateError
from fedtalos.metrics import Metrics
from fedtalos.randomness import generator
from fedtalos.training.engine.batches import batches_of, stages_passed
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.step import Stack
from fedtalos.training.entries import Values
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, Updates, one_by_one
from fedtalos.training.local_training import LocalTraining, Watch, unwatched
from fedtalos.training.loop import Step, add_up, check_values, fetch
from fedtalos.training.masked_parameters import MaskedParameters

log = logging.getLogger(__name__)


class Kept:
    """Stacks that are kept to be used again, the last few that were.

    >>> engine = partial(stacked, size=1, compile="graph", kept=Kept())
    """

    def __init__(self) -> None:
        self._stacks: dict[object, Stack] = {}

    def get(self, key: object, make: Callable[[], Stack], *, most: int) -> Stack:
        """Find the stack of that key, or make it; ``most`` are kept."""
        stack = self._stacks.pop(key, None)
        if len(self._stacks) >= most:
            del self._stacks[next(iter(self._stacks))]
            gc.collect()
        self._stacks[key] = make() if stack is None else stack
        return self._stacks[key]

    def clear(self) -> None:
        """Let go of all of them, and of their memory: a stack and its steps know each other."""
        self._stacks.clear()
        gc.collect()


def stacked(
    moving: MaskedParameters,
    clients: Clients,
    local: LocalTraining,
    seed: int,
    algorithm: FedAvg,
    *,
    size: int,
    compile: Compile = "off",
    watch: Watch = unwatched,
    message: Callable[[int], Tensor | None] | None = None,
    kept: Kept | None = None,
) -> Updates:
    """Train up to ``size`` neighbours of a round at once where their batches have one shape.

    Each client trains as it would by itself, up to the rounding of sums. Figures are read from the device once, at
    the end of a stack: what went wrong is known only then, and of which client. Stacks that do not fit into memory are
    halved, down to clients one by one. ``compile`` says how steps run: as they stand, as CUDA graphs, or compiled too.
    ``message`` replaces the algorithm's own, where another process is the server. Where clients train apart, this is
    called once for each: stacks, and what was captured of their steps, stay in ``kept`` from one call to the next.

    Raises InputError for models of other libraries, which cannot be stacked.

    >>> rounds = fedavg(model, clients, local=local, rounds=10, engine=partial(stacked, size=10))
    """
    passed = stages_passed(moving, local)

    stacks = Kept() if kept is None else kept

    def stack_of(count: int, way: Compile) -> Stack:
        make = partial(Stack, moving, local, count, passed=passed, compile=way)
        # a round's stacks, and smaller ones that may be left over
        return stacks.get((moving, local, count, way), make, most=4 if compile != "off" else 2)

    def together(number: int, group: Sequence[int], theta: Values, share: float) -> list[tuple[int, Update | Lost]]:
        size = len(group) if compile == "off" else filled(len(group), limit)
        stack = stack_of(size, "graph" if compile == "on" and size < limit else compile)
        steps = local.steps_for(len(clients[group[0]]))
        sent = [algorithm.message(moving, client) if message is None else message(client) for client in group]
        messages = [tensor for tensor in (*sent, *[sent[-1]] * (size - len(group))) if tensor is not None]
        stack.load(theta)
        made = algorithm.client_side(stack, torch.stack(messages) if messages else None, steps)
        correction = stack.adjust_by(made)
        places = [*group, *[group[-1]] * (size - len(group))]
        ids = [clients[client] for client in places]
        rngs = [generator(seed, "batches", number, client) for client in places]
        batches = watch(batches_of(moving, local, clients.images, ids, rngs, steps=steps), share / steps)
        taken = stack.train(batches, local.rate(number - 1))
        replies = None if correction is None or correction.reply is None else correction.reply.clone()
        return [
            (client, found if isinstance(found, Lost) else Update(values, found, None if replies is None else reply))
            for client, found, values, reply in zip(
                group, outcomes(stack, taken), stack.clients, places if replies is None else replies, strict=False
            )
        ]

    def together_if_it_fits(
        number: int, group: Sequence[int], theta: Values, share: float
    ) -> list[tuple[int, Update | Lost]] | None:
        try:
            return together(number, group, theta, share)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        stacks.clear()  # only here is the error gone, and with it the frames that held the activations
        if moving.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def alone(number: int, group: Sequence[int], theta: Values, share: float) -> Iterator[tuple[int, Update | Lost]]:
        within = one_by_one(
            moving, clients, local, seed, algorithm, message=message, watch=lambda b, s: watch(b, s * share)
        )
        return iter(within(number, group, theta))

    def plan(client: int) -> tuple[int, ...]:
        """Sizes of the client's batches: only batches of one shape can be stacked."""
        count = len(clients[client])
        return batch_sizes(count, local.batch_size, local.steps_for(count)) if count else ()

    limit = size

    def updates(number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        nonlocal limit
        for sizes, neighbours in groupby(chosen, key=plan):
            same = list(neighbours)
            while same:
                group = same[:limit]
                if not sizes or not group:  # without images, or where even a stack of one does not fit
                    yield from alone(number, same, theta, len(same) / len(chosen))
                    break
                found = together_if_it_fits(number, group, theta, len(group) / len(chosen))
                if found is None:
                    limit = len(group) // 2
                    rest = f"{limit} at once" if limit else "one by one, in smaller batches,"
                    log.warning(
                        "a stack of %d does not fit into memory: clients train %s from now on", len(group), rest
                    )
                    continue
                yield from found
                same = same[len(group) :]

    return updates


def filled(count: int, most: int) -> int:
    """Size of the stack that takes ``count`` clients: 1, 2, 4, ... or ``most``; the last client fills empty places.

    So a few graphs serve groups of all sizes.

    >>> [filled(count, 10) for count in (1, 3, 5, 9)]
    [1, 4, 8, 10]
    """
    return min(most, 1 << (count - 1).bit_length())


def outcomes(stack: Stack, taken: Sequence[Step]) -> list[Metrics | Lost]:
    """Every client's metrics, or why its update does not count; waits for the device."""
    unchecked, figures = stack.finite(), fetch(taken)  # (V,) and (J, 3, V)
    found: list[Metrics | Lost] = []
    for place, finite in enumerate(unchecked.tolist()):
        try:
            found.append(add_up(taken, figures[..., place]))
            if not finite:
                check_values(stack.clients[place], taken[-1])
        except BadUpdateError as error:
            found[place:] = [Lost(str(error), sent=True)]
    return found
