"""Train on all images in one place: the baseline."""

from collections.abc import Iterator
from functools import partial

from rich.console import Console

from fedtalos.app.config.schema import CentralizedConfig
from fedtalos.app.engine import with_engine
from fedtalos.app.federation import head_training, local_training, settled
from fedtalos.app.load import load
from fedtalos.app.moving import moving_parameters
from fedtalos.app.run.evaluation import evaluate_split
from fedtalos.app.run.first_head import everyone, fit_first_head
from fedtalos.app.run.folders import begun
from fedtalos.app.run.interruption import safe_point, until_asked
from fedtalos.app.run.launch import check_alone
from fedtalos.app.run.session import Session
from fedtalos.metrics import Metrics
from fedtalos.training.centralized import train_centralized
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.local_training import Watch
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.optimizer_state import optimizer_tensors, restore_optimizer


def run(config: CentralizedConfig, console: Console) -> None:
    """Train for ``num_epochs`` epochs."""
    check_alone(config.command)
    with begun(config, console) as paths:
        loaded = load(config)
        images, moving, local = loaded.data.train, moving_parameters(loaded), local_training(loaded.config)
        loaded = with_engine(loaded, moving, local)
        way = loaded.config.run.steps
        total = config.num_epochs
        with Session(loaded, paths, console, unit="epoch", total=total, rate=local.rate) as session:
            evaluate = partial(evaluate_split, loaded, moving, watch=session.evaluating)
            session.introduce(moving)
            optimizer = local.optimizer_for(moving)
            session.state = partial(optimizer_tensors, optimizer)
            if session.fresh:

                def head_epochs(head: MaskedParameters, seed: int, watch: Watch) -> Iterator[tuple[Round, int, int]]:
                    rounds, training = settled(loaded.config.train.head_rounds), head_training(loaded.config)
                    for number, metrics in train_centralized(
                        head,
                        images,
                        local=training,
                        epochs=rounds,
                        seed=seed,
                        watch=watch,
                        compile="graph" if way == "on" else way,
                    ):
                        yield Round(number, train=metrics), 0, 0

                fit_first_head(session, moving, everyone(len(images)), head_epochs)
            else:
                restore_optimizer(optimizer, session.saved)
            session.keep_start(moving)

            def watch(batches: Batches, share: float) -> Batches:
                return session.display.watch(until_asked(batches), share)

            def whole_epochs() -> Iterator[Round]:
                for number, metrics in train_centralized(
                    moving,
                    images,
                    local=local,
                    epochs=total,
                    seed=config.run.seed,
                    optimizer=optimizer,
                    done=session.done,
                    so_far=session.progress.epoch_so_far,
                    watch=watch,
                    compile=way,
                ):
                    if metrics.examples < len(images):  # asked to stop within the epoch
                        session.progress.epoch_so_far = metrics
                        safe_point()
                    session.progress.epoch_so_far = Metrics()
                    yield Round(number, train=metrics)

            if session.due(session.done):
                session.validate(evaluate)
            for epoch in session.shown(whole_epochs()):
                session.record(epoch)
                if session.due(epoch.number):
                    session.validate(evaluate)
            session.finish(evaluate, {"moving_parameters": len(moving)})
