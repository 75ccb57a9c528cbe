"""Time that a run of a grid will take, by the grid's finished runs."""

from collections.abc import Mapping, Sequence

from fedtalos.app.config.rounds import local_epochs, rounds_of
from fedtalos.app.config.schema import LOOKS_AT_IMAGES, CentralizedConfig, EditingConfig, FederatedConfig, RunConfig
from fedtalos.app.sweep.grid import Cell
from fedtalos.app.sweep.tables import Result


def estimate(cell: Cell, finished: Sequence[Result]) -> float | None:
    """Seconds of the whole run; None where no finished run of its command has the same data and model.

    The finished run with the most options in common counts, its seconds scaled by how much there is to train or score.
    """
    alike = [result for result in finished if _kind(result.cell) == _kind(cell)]
    if not alike:
        return None
    nearest = min(alike, key=lambda result: _differences(result.cell.asked, cell.asked))
    return nearest.values["seconds"] * _work(cell.config) / _work(nearest.cell.config)


def _kind(cell: Cell) -> tuple[object, ...]:
    """Options that two runs must share for one to tell the other's time."""
    config, weights = cell.config, cell.asked.get("weights")  # as asked: run:NAME is the same for every seed
    model = (config.model.model_size, config.model.image_size, config.model.patch_size)
    if isinstance(config, EditingConfig):
        work: object = config.editing.criterion in LOOKS_AT_IMAGES
    else:
        work = isinstance(config, FederatedConfig) and local_epochs(config) is not None
    return config.command, config.data, weights, model, work


def _differences(first: Mapping[str, object], second: Mapping[str, object]) -> int:
    return sum(first.get(key) != second.get(key) for key in {*first, *second})


def _work(config: RunConfig) -> float:
    """Images to train on or to score, or passes over the training images where epochs are counted."""
    if isinstance(config, CentralizedConfig):
        return config.num_epochs
    if isinstance(config, EditingConfig):
        return config.editing.num_iterations * config.editing.calibration_images
    federation, rounds = config.federation, rounds_of(config)
    trained = rounds.total * rounds.clients
    if (epochs := local_epochs(config)) is not None:
        return trained * epochs / config.split.num_clients
    return trained * federation.local_steps * config.train.batch_size
