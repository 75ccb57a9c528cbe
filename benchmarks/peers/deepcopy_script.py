"""The script that people write: a deep copy of the model per client, a DataLoader, a list of state dicts.

python benchmarks/peers/deepcopy_script.py [settings]
"""

import copy
from itertools import islice

import torch
import tyro
from task import Meter, Settings, client_images, client_size, freeze, loss, make_model, make_optimizer, sampled_clients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def main(settings: Settings) -> None:
    meter = Meter()
    torch.set_num_threads(settings.threads)
    model = make_model(settings)
    freeze(model, settings)
    meter.mark()
    for number in range(1, settings.rounds + 1):
        clients = sampled_clients(settings, number)
        states = [train_client(model, client, settings) for client in clients]
        model.load_state_dict(average(states, [client_size(settings, client) for client in clients]))
        meter.mark()
    meter.report(settings, model)


def train_client(model: nn.Module, client: int, settings: Settings) -> dict[str, Tensor]:
    local = copy.deepcopy(model)
    freeze(local, settings)
    optimizer = make_optimizer([p for p in local.parameters() if p.requires_grad], settings)
    loader = DataLoader(TensorDataset(*client_images(settings, client)), batch_size=settings.batch_size)
    for pixels, labels in islice(loader, settings.local_steps):
        optimizer.zero_grad()
        loss(local, pixels, labels, settings).backward()
        optimizer.step()
    return local.state_dict()


def average(states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    total = sum(sizes)
    return {
        key: sum(state[key] * (size / total) for state, size in zip(states, sizes, strict=True)) for key in states[0]
    }


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
