"""What a round costs beside its arithmetic: rounds against bare steps, rounds without training, many clients, batches.

    python benchmarks/simulator.py --output benchmarks/results/simulator.md

Everything is timed in one process, variants in turns. The floors are measured in the same run: the time of matrix
products as large as the model's linear layers for the multiply-adds of a step, and of plain copies for bytes moved.
benchmarks/peers holds the comparison with other simulators.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from measure import environment, markdown_table, peak_memory, timed_ratios
from rounds import Load, Rounds, Setting, Variant, each, products, random_images

from fedtalos.data.batches import training_batches
from fedtalos.data.images import LabelledImages
from fedtalos.data.view import View
from fedtalos.metrics import Metrics
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.entries import Values
from fedtalos.training.feature_cache import view_of
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Lost, Update, Updates
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    threads: int = torch.get_num_threads()
    repeats: int = 5
    batch_size: int = 64
    output: Path | None = None
    """also write the tables here"""


def bare_steps(rounds: Rounds, load: Load) -> Callable[[], object]:
    """A call that takes a round's steps with torch.optim's AdamW, on one batch that is ready, and nothing else."""
    stored = rounds.clients.images
    model = Rounds(rounds.setting, rounds.variant, load, stored).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = view_of(model)(stored.pixels[: load.batch_size]), stored.labels[: load.batch_size]

    def steps() -> None:
        for _ in range(load.per_round * load.steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def rounds_and_steps(options: Options) -> str:
    """A dense round beside the same steps in a bare loop, and beside its matrix products alone."""
    lines = []
    for setting in (Setting("micro", 32, 4), Setting("tiny", 32, 4)):
        load = Load(clients=2, per_round=2, steps=2, batch_size=options.batch_size)
        images = random_images(setting, load, CPU)
        dense, masked = (Rounds(setting, Variant("fp32", moves), load, images) for moves in ("all", "qk"))
        calls = {
            "the steps in a bare loop": bare_steps(dense, load),
            "a round, dense": each(dense),
            "a round, 90 % mask in q and k": each(masked),
            "products alone, dense": products(load, dense),
            "products alone, mask": products(load, masked),
        }
        found = timed_ratios(calls, options.repeats)
        lines += [(str(setting), name, f"{t.seconds:.2f}", f"{t.ratio:.2f}") for name, t in found.items()]
    title = "## A round beside the same steps\n\n2 clients, 2 steps; rounds crop, flip and clip, bare steps do not.\n\n"
    return title + markdown_table(("model", "what", "s", "ratio"), lines)


def idle(moving: MaskedParameters, _clients: Clients, _local: LocalTraining, _seed: int, _algorithm: FedAvg) -> Updates:
    """Clients that get theta and send it back."""

    def updates(_number: int, chosen: Sequence[int], theta: Values) -> Iterator[tuple[int, Update | Lost]]:
        for client in chosen:
            moving.load(theta)
            yield client, Update(moving.rows, Metrics(1.0, 1, 1))

    return updates


def idle_rounds(options: Options) -> str:
    """Rounds of 10 clients that train no step: ViT-S, dense and with a mask, beside ten copies of its bytes."""
    setting, load = Setting("small", 32, 4), Load(clients=10, per_round=10, steps=1, batch_size=1)
    images = random_images(setting, load, CPU)
    works = {moves: Rounds(setting, Variant("fp32", moves), load, images) for moves in ("all", "qk")}
    calls: dict[str, Callable[[], object]] = {}
    source, target = (torch.randn(sum(p.numel() for p in works["all"].model.parameters())) for _ in range(2))
    calls["ten copies of all bytes"] = lambda: [target.copy_(source) for _ in range(10)]
    for moves, work in works.items():
        calls[{"all": "a round, dense", "qk": "a round, 90 % mask in q and k"}[moves]] = each(work.rounds(idle))
    found = timed_ratios(calls, 3 * options.repeats)
    lines = [(name, f"{1e3 * t.seconds:.0f}", f"{t.ratio:.2f}") for name, t in found.items()]
    return "## Rounds without a step\n\nViT-S, 10 clients, J = 0.\n\n" + markdown_table(("what", "ms", "ratio"), lines)


def a_round_of_many(registered: int, sampled: int) -> Callable[[], object]:
    """A call that takes one round of micro ViTs, a step on one 8 px image each, of ``registered`` clients."""
    torch.set_num_threads(1)
    load = Load(clients=registered, per_round=sampled, steps=1, batch_size=1)
    pixels = torch.zeros(registered, 3, 8, 8, dtype=torch.uint8)
    images = LabelledImages(pixels, torch.zeros(registered, dtype=torch.int64))
    work = Rounds(Setting("micro", 8, 4), Variant("fp32", "all"), load, images)
    call = each(work)
    call()  # the optimiser's state and the gradients are there from now on
    return call


def many_clients() -> str:
    """What more clients a round, and more registered ones, add to memory."""
    lines = []
    for registered, sampled in ((1000, 10), (1000, 1000), (1_000_000, 1000)):
        grown = peak_memory(a_round_of_many, registered, sampled)
        lines.append((f"{registered:,}", f"{sampled:,}", f"{grown / 2**20:.1f}"))
    title = "## Many clients\n\nMicro ViT (2.7 MB), J = 1, one 8 px image each; what a round adds to the peak.\n\n"
    return title + markdown_table(("registered", "in the round", "MiB"), lines)


def batches(options: Options) -> str:
    """Images a second, drawn, cropped, flipped, resized and normalised."""
    lines = []
    for pixels in (32, 96, 224):
        setting, load = Setting("tiny", 32, 4), Load(clients=1, per_round=1, steps=16, batch_size=options.batch_size)
        clients = Rounds(setting, Variant("fp32", "head"), load, random_images(setting, load, CPU)).clients
        view = View(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

        def draw(clients: Clients = clients, view: View = view) -> None:
            given = {"steps": 16, "batch_size": options.batch_size, "augmentation": "crop_flip"}
            for _ in training_batches(clients.images, clients[0], view, rng=generator(0, "batches"), **given):
                pass

        found = timed_ratios({"": draw}, options.repeats)[""]
        lines.append((f"32 to {pixels} px", f"{load.images_per_round / found.seconds:,.0f}"))
    return "## Batches\n\n" + markdown_table(("", "images/s"), lines)


def cached_features(options: Options) -> str:
    """A head-only epoch on features that were computed once, beside one on images."""
    setting, load = Setting("tiny", 32, 4), Load(clients=1, per_round=1, steps=4, batch_size=options.batch_size)
    images = random_images(setting, load, CPU)
    cached, work = (Rounds(setting, Variant("fp32", "head"), load, images, augmentation="none") for _ in range(2))
    work.moving.frozen_stages = 0
    found = timed_ratios({"on cached features": each(cached), "on images": each(work)}, options.repeats)
    lines = [(name, f"{1e3 * t.seconds:.1f}", f"{t.ratio:.0f}") for name, t in found.items()]
    return f"## A round of the head alone\n\n{setting}, 4 steps.\n\n" + markdown_table(("", "ms", "ratio"), lines)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.randn(1, generator=torch_generator(0, "warm-up"))
    text = f"{environment()}, batch {options.batch_size}, median of {options.repeats}\n\n"
    parts = (rounds_and_steps, idle_rounds, batches, cached_features)
    text += "\n".join([part(options) for part in parts] + [many_clients()])
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
