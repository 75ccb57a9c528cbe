"""Our simulator beside its peers: seconds per round, overhead of a round without training, start, memory; in one table.

    python benchmarks/peers/run.py [settings]
    python benchmarks/peers/run.py --peers ours pfl pfl:processes=2,precision=bf16 flower:actors=2 --repeats 3
    python benchmarks/peers/run.py --check        # do they compute the same?

A peer is a script's name below, with flags of that script after a colon. Each runs as a process of its own, with the
Python of its environment (see README.md here); a peer without one is left out, and said so. Peers take turns, once with
the local steps of the settings and once with none, so that a slow spell of the machine meets all.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from task import Settings, make_model
from torch import Tensor

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from measure import environment, markdown_table  # noqa: E402

SCRIPTS = {  # peer: script, environment
    "ours": ("ours.py", None),
    "bare": ("bare.py", None),
    "deepcopy": ("deepcopy_script.py", None),
    "pfl": ("pfl_simulation.py", "pfl"),
    "flower": ("flower_simulation.py", "flower"),
    "blazefl": ("blazefl_simulation.py", "blazefl"),
    "jax": ("jax_vit.py", "jax"),
}
PEERS = ("ours", "bare", "deepcopy", "pfl", "pfl:processes=2", "flower:actors=1", "flower:actors=2")
PEERS += ("blazefl", "blazefl:parallel=2", "blazefl:parallel=2,processes", "jax")
HEADER = ("peer", "s a round", "to ours", "s a round, J = 0", "to ours", "s to the end of round 1", "peak memory, MB")


@dataclass(frozen=True)
class Options:
    """What is run, and how often."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    peers: tuple[str, ...] = PEERS
    repeats: int = 2
    environments: Path = HERE / ".venvs"
    """the folder of the environments pfl, flower, blazefl and jax"""
    check: bool = False
    """instead of timing, compare the weights after one round of plain SGD with the bare loop's"""
    timeout: float = 3600
    """seconds for one run of one peer"""
    output: Path | None = None
    """also write the table here"""


@dataclass(frozen=True)
class Run:
    """A peer's line."""

    round_seconds: list[float]
    first_round_after: float
    peak_mb: float
    versions: dict[str, str]

    @property
    def seconds(self) -> float:
        """Median of the rounds after the first."""
        return median(self.round_seconds[1:] or self.round_seconds)


def python_of(peer: str, environments: Path) -> str:
    environment = SCRIPTS[peer.partition(":")[0]][1]
    return sys.executable if environment is None else str(environments / environment / "bin" / "python")


def run(peer: str, settings: Settings, options: Options) -> Run | None:
    """One run in a fresh process; None, and a line that says why, where it failed."""
    name, _, flags = peer.partition(":")
    command = [python_of(peer, options.environments), str(HERE / SCRIPTS[name][0])]
    for key, value in asdict(settings).items():
        command += [] if value is None else [f"--{key}", str(value)]
    for flag in filter(None, flags.split(",")):
        key, _, value = flag.partition("=")
        command += [f"--{key}", value] if value else [f"--{key}"]
    hidden = {"PFL_PYTORCH_DEVICE": settings.device}
    if settings.device == "cpu":
        hidden |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)])
    try:
        done = subprocess.run(
            command,
            env=os.environ | hidden | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=options.timeout,
        )
    except subprocess.TimeoutExpired:
        print(f"{peer}: stopped after {options.timeout:g} s", flush=True)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"round_seconds"')]
    if done.returncode or not lines:
        print(f"{peer}: failed with exit status {done.returncode}\n{done.stderr[-2000:]}", flush=True)
        return None
    return Run(**json.loads(lines[-1]))


def measure(options: Options, peers: Sequence[str]) -> str:
    """The table."""
    without = replace(options.settings, local_steps=0)
    trained: dict[str, list[Run]] = {peer: [] for peer in peers}
    idle: dict[str, list[Run]] = {peer: [] for peer in peers}
    for turn in range(options.repeats):
        for peer in peers:
            for runs, settings in ((trained, options.settings), (idle, without)):
                result = run(peer, settings, options)
                if result is not None:
                    runs[peer].append(result)
            print(f"turn {turn + 1}: {peer}: {[round(r.seconds, 3) for r in trained[peer] + idle[peer]]}", flush=True)
    rows = [row(peer, trained, idle) for peer in peers if trained[peer] and idle[peer]]
    versions: dict[str, str] = {}
    for runs in trained.values():
        for result in runs:
            versions |= result.versions
    s = options.settings
    torch.set_num_threads(s.threads)
    what = (
        f"{environment()}, {', '.join(f'{name} {number}' for name, number in versions.items() if name != 'torch')}; "
        f"ViT-{s.model_size}/{s.patch_size}, {s.image_size} px, {s.sampled} of {s.clients} clients, "
        f"J = {s.local_steps}, batch {s.batch_size}, {s.optimizer}, {s.precision}, moves {s.moves}; "
        f"{s.rounds} rounds, median of {options.repeats} turns"
    )
    return f"{what}\n\n{markdown_table(HEADER, rows)}"


def row(peer: str, trained: Mapping[str, list[Run]], idle: Mapping[str, list[Run]]) -> list[str]:
    """Medians over turns; ratios within a turn first."""
    cells = [peer]
    for runs in (trained, idle):
        cells.append(f"{median(result.seconds for result in runs[peer]):.3f}")
        ratios = [r.seconds / o.seconds for r, o in zip(runs[peer], runs.get("ours", []), strict=False)]
        cells.append(f"{median(ratios):.2f}" if ratios else "")
    cells.append(f"{median(result.first_round_after for result in trained[peer]):.1f}")
    cells.append(f"{max(result.peak_mb for result in trained[peer]):.0f}")
    return cells


def check(options: Options, peers: Sequence[str]) -> str:
    """Largest difference of any weight from the bare loop's, after one round of plain SGD with all clients."""
    settings = replace(
        options.settings, sampled=options.settings.clients, rounds=1, optimizer="sgd", precision="fp32", save=None
    )
    start, rows = make_model(settings).state_dict(), []
    with tempfile.TemporaryDirectory() as folder:
        files = {peer: Path(folder) / str(number) for number, peer in enumerate(("bare", *peers))}
        done = [peer for peer, file in files.items() if run(peer, replace(settings, save=file), options)]
        weights = {peer: torch.load(files[peer]) for peer in done}
    for peer in done:
        rows.append([peer, f"{distance(start, weights[peer]):.1e}", f"{distance(weights['bare'], weights[peer]):.1e}"])
    return markdown_table(("peer", "furthest a weight moved", "furthest from the bare loop's"), rows)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main(options: Options) -> None:
    for peer in options.peers:
        if peer.partition(":")[0] not in SCRIPTS:
            sys.exit(f"--peers: expected names among {', '.join(SCRIPTS)}, got {peer}")
    there = [peer for peer in options.peers if Path(python_of(peer, options.environments)).is_file()]
    for peer in options.peers:
        if peer not in there:
            print(f"{peer}: left out, for there is no {python_of(peer, options.environments)}: see {HERE}/README.md")
    text = (check if options.check else measure)(options, there)
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
