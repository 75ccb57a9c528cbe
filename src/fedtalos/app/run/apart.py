"""Runs whose tasks, or clients, train apart from one start: --tasks, --one_shot, and continual's.

A run that was stopped goes on from its last checkpoint: of every --eval_every rounds, and of a unit's end. What a
unit left is kept as soon as it has trained.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor

from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import algorithm_of, local_training, transforms_of
from fedtalos.app.load import Loaded
from fedtalos.app.merging import Merger, factor, that_sent
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import say
from fedtalos.app.run.first_head import HeadRounds, fit_first_head
from fedtalos.app.run.folders import say_decisions
from fedtalos.app.run.holders import Holders
from fedtalos.app.run.kept import Kept, Unit, clients_in, groups_of, units_of
from fedtalos.app.run.session import ALGORITHM, Evaluate, Session
from fedtalos.app.run.task_table import write_task_table
from fedtalos.models.heads import ClosedForm, HeadSums, closed_form, head_of, set_head
from fedtalos.notes import note
from fedtalos.training.editing.task_vectors import TaskVector, scaled
from fedtalos.training.federated.apart import at_once, train_apart, unit_seed
from fedtalos.training.federated.client_sampling import sample_clients
from fedtalos.training.federated.fedavg import FedAvg, Round
from fedtalos.training.federated.traffic import Traffic
from fedtalos.training.head_fitting import fit_to_sums
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters

APART = "apart/"
"""Prefix, in checkpoints, of what every unit starts from: the values that move, and the head."""
AFTER = "after-"
"""Prefix of the names of vectors that lead from the common start over all units so far."""


class Apart:
    """Units that train apart, from their first round to the merged model.

    apart = Apart(loaded, holders, moving, session)
    apart.begin(head_rounds)
    figures = apart.run(evaluate, traffic)
    """

    def __init__(
        self, loaded: Loaded[FederatedConfig], holders: Holders, moving: MaskedParameters, session: Session
    ) -> None:
        self.loaded, self.holders, self.moving, self.session = loaded, holders, moving, session
        self.config = loaded.config
        self.groups = groups_of(self.config, loaded.data)
        self.units = units_of(self.config, holders, self.groups)
        rounds = rounds_of(self.config)
        self.each, self.fraction = rounds.each, rounds.fraction
        self.kept = Kept(session.paths)
        self.kind: ClosedForm = closed_form(self.config.model.head) or "ridge"
        self.algorithm = FedAvg()
        self.start, self.head = moving.vector(), head_of(loaded.model)
        self._underway = bool(session.done % self.each)

    def begin(self, head_rounds: HeadRounds) -> None:
        """Fit the first head and keep the units' sums, or take up a run that was stopped."""
        session, model = self.session, self.loaded.model
        session.state = self._state
        if not session.fresh:
            saved = session.restored(APART, shapes_of_start(self.moving))
            self.start, self.head = saved["start"], (saved["head.weight"], saved["head.bias"])
            reached = self.moving.vector()
            set_head(model, *self.head, source=model.head_source)  # the checkpoint may hold the refitted one
            self.moving.write(reached)
            return
        if kind := closed_form(self.config.model.head):
            start = time.perf_counter()
            say(session.console, f"fitting the {kind} head")
            total, clients = self._sums_of(self.units, kind, keep=True)
            fit_to_sums(model, total, self.loaded.limited("val"), kind, self.loaded.features)
            say_decisions(session.paths, session.console)
            session.progress.count(*self.holders.sent((0, clients * total.wire_bytes)))
            self.loaded.features.keep_only(self.moving.frozen_stages)
            session.progress.seconds += time.perf_counter() - start
        else:
            fit_first_head(session, self.moving, (), head_rounds)
        self.start, self.head = self.moving.vector(), head_of(model)

    def run(self, evaluate: Evaluate, traffic: Traffic) -> dict[str, Any]:
        """Train the units and merge them, validating before and after; returns what the summary says of it."""
        session = self.session
        if session.done == 0 and session.due(0):
            session.validate(evaluate)
        self.skip(traffic)
        for round_ in session.shown(self.rounds()):
            session.record(round_, *self.holders.sent(traffic.count(round_)))
        figures = self.merge()
        if session.due(session.done):  # else a run that goes on has done so
            session.validate(evaluate)
        return figures

    def rounds(self, *, onward: bool = False, first: int = 0) -> Iterator[Round]:
        """Train the units one after another; every one's vector is kept when it is there.

        With ``onward`` each starts where the one before it ended, and its vector's name begins with AFTER. ``first``
        rounds of the run come before these.
        """
        config, total, prefix = self.config, self.each * len(self.units), AFTER if onward else ""
        done = min(max(self.session.done - first, 0), total)
        last = done // self.each - 1
        if done % self.each == 0 < done and not self.kept.vector(prefix + self.units[last].name).exists():
            self._keep(prefix, last, self.moving.vector() - self.start)  # the run was stopped before it was kept
        if done == total:
            return  # what the model holds belongs to rounds after these
        members = [unit.members for unit in self.units]
        shared = len(members) - done if at_once(self.each, self.fraction, onward=onward) else 1

        def watch(batches: Batches, share: float) -> Batches:
            return self.session.watch(batches, share * shared)  # of a unit's round, where one round is all units'

        rounds = train_apart(
            self.moving,
            self.holders.clients,
            local=local_training(config).but(groups=self.groups if config.apart.local_classes == "task" else ()),
            units=members,
            rounds=self.each,
            fraction=self.fraction,
            sampling=config.federation.client_sampling,
            seed=config.run.seed,
            keep=partial(self._keep, prefix),
            start=self.start,
            onward=onward,
            algorithm=self._new_algorithm,
            through=lambda own, seed: transforms_of(config, own, local_training(config), seed),
            engine=self.holders.engine(watch),
            on_bad_client=config.failures.on_bad_client,
            done=done,
        )
        for round_ in rounds:
            yield replace(round_, number=first + round_.number)
            if round_.number % self.each and self.session.due(first + round_.number):
                self.session.save()  # at a unit's end its vector is kept, and the run saved with that

    def skip(self, traffic: Traffic) -> None:
        """Note whom the rounds that are done have met, for a run that goes on."""
        total = self.each * len(self.units)
        for number in range(min(self.session.done, total)):  # a second pass over the units meets nobody new
            unit, round_ = self.units[number // self.each], number % self.each + 1
            seed, sampling = unit_seed(self.config.run.seed, unit.members), self.config.federation.client_sampling
            chosen = sample_clients(len(unit.members), self.fraction, seed, round_, sampling)
            traffic.count(Round(round_, tuple(unit.members[client] for client in chosen)))

    def vectors(self, prefix: str = "") -> list[TaskVector]:
        """Vectors of the units, read from their files."""
        return [self.kept.read(prefix + unit.name, self.moving) for unit in self.units]

    def own_vectors(self) -> dict[int, Tensor]:
        """Vectors (A,) of clients that trained by themselves; none where tasks did."""
        if self.groups:
            return {}
        return {unit.members[0]: self.kept.read(unit.name, self.moving).values for unit in self.units}

    def merge(self) -> dict[str, Any]:
        """Merge the vectors into the model, fit the head on that, and say what came of it."""
        options, session, vectors = self.config.apart, self.session, self.vectors()
        self.moving.write(self.start)
        merger = Merger(self.loaded, self.holders, self.moving, self.start, self.head)
        units, own = that_sent(self.units, vectors)
        if len(units) < len(self.units):
            silent = [unit.name for unit in self.units if unit not in units]
            note("merge", f"without {', '.join(silent[:12])}{', ...' if silent[12:] else ''}: nothing came back")
        merged = merger.merged(units, own)
        alpha = factor(self.loaded, merged, refit=self.kind if options.refit_head else None)
        theta = self.start + scaled(merged.values, alpha).to(self.start.device)
        self.moving.write(theta)
        down, up = merger.traffic(units)
        if options.refit_head:
            asked, sent = self.refit(self.units)
            down, up = down + self.moving.nbytes * asked, up + sent  # the merged vector, and sums over its features
        if session.progress.validated != session.done:  # else they were counted before the run was stopped
            session.progress.count(*self.holders.sent((down, up)))
        table = {}
        if self.groups:
            table = write_task_table(
                self.loaded,
                self.moving,
                self.units,
                self.start,
                self.head,
                theta,
                vectors,
                session.paths.results,
                session.console,
            )
        names = [unit.name for unit in self.units]
        refit = self.kind if options.refit_head else "none"
        return {"merged": {"rule": options.merge, "alpha": round(alpha, 6), "refit": refit, "units": names}, **table}

    def refit(self, units: list[Unit]) -> tuple[int, int]:
        """Fit the head to these units' sums over the model's features; returns clients asked and bytes sent."""
        loaded, (total, clients) = self.loaded, self._sums_of(units, self.kind)
        fit_to_sums(loaded.model, total, loaded.limited("val"), self.kind, loaded.features)
        return clients, clients * total.wire_bytes

    def _new_algorithm(self) -> FedAvg:
        """A fresh algorithm for the next unit; for the one that a stopped run was at, with its state."""
        self.algorithm = algorithm_of(self.config)
        if self._underway:
            self.algorithm.state |= self.session.restored(ALGORITHM, len(self.moving))
            self._underway = False
        return self.algorithm

    def _sums_of(self, units: list[Unit], kind: ClosedForm, *, keep: bool = False) -> tuple[HeadSums, int]:
        """Sum these units' clients' features against their labels; returns the sums, and how many clients sent some.

        With ``keep`` each unit's are kept in a file.
        """
        clients, sizes, count = clients_in(units), self.holders.clients.sizes, 0
        total: HeadSums | None = None
        unit_of = {client: unit.name for unit in units for client in unit.members}
        found = self.holders.head_sums(clients, kind)
        with bar("features for the head", int(sizes[clients].sum()), "images") as advance:
            for name, of_unit in groupby(found, lambda pair: unit_of[pair[0]]):
                own: HeadSums | None = None
                for client, sums in of_unit:
                    own = sums if own is None else own + sums
                    total = sums if total is None else total + sums
                    advance(int(sizes[client]))
                    count += 1
                if keep and own is not None:
                    self.kept.write_sums(name, own)
        assert total is not None
        return total, count

    def _keep(self, prefix: str, number: int, values: Tensor) -> None:
        unit = self.units[number]
        if prefix:  # the vector leads over the units before it, too
            unit = replace(unit, classes=tuple(label for seen in self.units[: number + 1] for label in seen.classes))
        self.kept.write(unit, values, self.moving, self.head, self.loaded.data.classes, prefix)
        self.session.save()

    def _state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint beside the model's."""
        start = {"start": self.start, "head.weight": self.head[0], "head.bias": self.head[1]}
        return {f"{APART}{name}": tensor for name, tensor in start.items()} | {
            f"{ALGORITHM}{name}": tensor for name, tensor in self.algorithm.state.items()
        }


def shapes_of_start(moving: MaskedParameters) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint holds of the start, under APART."""
    weight, bias = moving.model.head.parameters()
    return {"start": (len(moving),), "head.weight": tuple(weight.shape), "head.bias": tuple(bias.shape)}
