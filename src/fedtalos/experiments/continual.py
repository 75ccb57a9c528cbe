"""Train federatedly on one task after another, and compare with tasks that train apart and are merged."""

from functools import partial
from itertools import chain

from rich.console import Console

from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import ContinualConfig
from fedtalos.app.federation import local_training
from fedtalos.app.run.apart import Apart
from fedtalos.app.run.courses import courses, write_courses
from fedtalos.app.run.evaluation import evaluate_split
from fedtalos.app.run.folders import begun
from fedtalos.app.run.holders import LocalHolders
from fedtalos.app.run.kept import Kept
from fedtalos.app.run.launch import check_alone
from fedtalos.app.run.session import Session
from fedtalos.app.run.split_file import write_split
from fedtalos.errors import InputError
from fedtalos.experiments.federated import begin, first_contact_bytes, rounds_of_the_head
from fedtalos.training.federated.traffic import Traffic


def run(config: ContinualConfig, console: Console) -> None:
    """Train T tasks one after another, then each by itself from the start; measure all courses, and write the table."""
    check_alone(config.command)
    if (config.apart.tasks or 0) < 2:
        raise InputError("continual: expected --tasks T, two or more groups of classes that come one after another")
    with begun(config, console) as paths:
        if not paths.started:
            Kept(paths).check_free()
        loaded, clients, moving, algorithm = begin(config)
        rounds, rate = rounds_of(loaded.config), local_training(loaded.config).rate
        with Session(
            loaded, paths, console, unit="round", total=rounds.total, rate=lambda done: rate(done % rounds.each)
        ) as session:
            session.introduce(moving, clients)
            write_split(paths.results, clients, loaded.data.classes)
            apart = Apart(loaded, LocalHolders(loaded, clients, moving), moving, session)
            apart.begin(partial(rounds_of_the_head, loaded, clients))
            evaluate = partial(evaluate_split, loaded, moving, watch=session.evaluating)
            if session.done == 0 and session.due(0):
                session.validate(evaluate)
            traffic = Traffic(moving, algorithm, len(clients), first_contact=first_contact_bytes(loaded, moving))
            apart.skip(traffic)
            for round_ in session.shown(chain(apart.rounds(onward=True), apart.rounds(first=rounds.total // 2))):
                session.record(round_, *traffic.count(round_))
            summary = write_courses(courses(apart), apart, console)
            if session.due(session.done):  # else a run that goes on has done so
                session.validate(evaluate)
            session.finish(evaluate, {**session.progress.figures(len(moving)), **summary})
