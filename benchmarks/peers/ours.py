"""fedtalos' own side: ``fedavg`` and ``train`` of the library, on the benchmark's task.

python benchmarks/peers/ours.py [settings]
"""

from functools import partial

import torch
import tyro
from task import Meter, Settings, client_batches, client_size, freeze, make_model, moving, normalised
from torch import nn

from fedtalos.metrics import Metrics
from fedtalos.parameters import Entries
from fedtalos.training.editing import eligible_entries
from fedtalos.training.fedavg import fedavg
from fedtalos.training.local import freeze_all_but, make_optimizer, train


def main(settings: Settings) -> None:
    meter = Meter()
    torch.set_num_threads(settings.threads)
    model = make_model(settings)
    entries = moving_entries(model, settings)
    freeze_all_but(model, entries)
    rule, rate = settings.optimizer, settings.learning_rate
    optimizer = make_optimizer(model, entries, rule=rule, learning_rate=rate, momentum=0.0, weight_decay=0.0)
    step = partial(train, model, learning_rate=lambda _: rate, clip_norm=None, precision=settings.precision)

    def update_client(_: int, client: int) -> Metrics:
        optimizer.state.clear()
        batches = ((normalised(pixels), labels) for pixels, labels in client_batches(settings, client))
        return step(batches, optimizer, entries)

    sizes = [client_size(settings, client) for client in range(settings.clients)]
    fraction = settings.sampled / settings.clients
    meter.mark()
    for _ in fedavg(
        model, entries, update_client, sizes, fraction=fraction, rounds=settings.rounds, seed=settings.seed
    ):
        meter.mark()
    meter.report(settings, model)


def moving_entries(model: nn.Module, settings: Settings) -> Entries:
    if settings.moves == "qk":
        return eligible_entries(model, "qk")
    freeze(model, settings)
    return Entries({name: torch.ones(p.shape, dtype=torch.bool) for name, p in moving(model).items()})


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
