"""The vector command: make task vectors of runs, show, apply, negate or merge them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from fedtalos.app.config.vector import (
    ValidationOptions,
    VectorApplyConfig,
    VectorConfig,
    VectorMakeConfig,
    VectorMergeConfig,
    VectorNegateConfig,
    VectorShowConfig,
)
from fedtalos.app.run.display import print_whole, say, say_facts, say_notes, say_pairs
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.vectors.base import base_of, save_edited
from fedtalos.app.vectors.made import made_of
from fedtalos.app.vectors.tables import norm_report
from fedtalos.app.vectors.validated import ALPHAS, interference, validated_alpha
from fedtalos.errors import InputError
from fedtalos.notes import noted
from fedtalos.training.editing.combine import overlap
from fedtalos.training.editing.describe_vectors import cosines, described, norm_table
from fedtalos.training.editing.merging import merge
from fedtalos.training.editing.task_vectors import TaskVector, apply, changed, check_together, scaled, weighted_sum
from fedtalos.training.editing.vector_file import load_vector, save_vector

OF_METHOD = {"share": "ties", "drop": "dare", "seed": "dare", "votes": "consensus", "selectivity": "consensus"}
OF_METHOD |= {"first": "lines", "last": "lines"}
OF_IMAGES = ("dataset", "data_dir", "eval_limit")
SUMS = {"fisher": "scores", "regmean": "moments"}


def run(config: VectorConfig, console: Console) -> None:
    """Do what the command line asks for, and print the files written."""
    noted()
    match config.tool:
        case VectorMakeConfig() as tool:
            written = make(tool)
        case VectorShowConfig() as tool:
            written = show(tool, console)
        case VectorApplyConfig() as tool:
            written = apply_to_base(tool, console)
        case VectorNegateConfig() as tool:
            written = negate(tool)
        case VectorMergeConfig() as tool:
            written = merged(tool, console)
    say_notes(console)
    for path in written:
        say(console, str(path))


def make(config: VectorMakeConfig) -> list[Path]:
    """Write the vector of a run or checkpoint.

    Raises InputError where there is none, its start cannot be had, or the new file exists.
    """
    return _written(config.name or config.run.stem, config.output_dir, lambda: made_of(config))


def show(config: VectorShowConfig, console: Console) -> list[Path]:
    """Print facts and norms of each vector, and cosines and overlaps of several; draw norms, cosines, interference."""
    from fedtalos.app.figures import vectors as figures  # slow to import
    from fedtalos.app.figures.draw import mask_names, name_together, write_figures

    _check_images(config, asked=config.base is not None, what="--base")
    vectors = [load_vector(path) for path in config.vectors]
    check_together(vectors)
    names = mask_names(config.vectors)
    if len(set(names)) < len(names):
        raise InputError("vectors: expected each with its own name; rename or choose")
    folder = name_together(names) if config.name is None else plain_name("--name", config.name)
    errors = None
    if config.base is not None:
        errors = interference(base_of(config.base, vectors, config.output_dir), config.base, vectors, config)
    plots = config.output_dir / "plots" / folder
    drawn = figures.plot_vectors(dict(zip(names, vectors, strict=True)), plots)
    if errors is not None:
        drawn += write_figures({"disentanglement": figures.disentanglement(ALPHAS, errors, *names)}, plots)
    for path, vector in zip(config.vectors, vectors, strict=True):
        say_facts(console, {"vector": str(path), **described(vector)})
        print_whole(console, norm_report(norm_table(vector)))
    if len(vectors) > 1:
        overlaps = np.array([[overlap(first.mask, second.mask) for second in vectors] for first in vectors])
        found = np.round(cosines(vectors), 2) + 0.0  # no -0.00
        say_pairs(console, "Cosines, in brackets the overlap of supports", found, overlaps)
    return drawn


def apply_to_base(config: VectorApplyConfig, console: Console) -> list[Path]:
    """Write the checkpoint of a base with vectors added.

    Raises InputError for vectors of other bases, a base that is not theirs, and a name that is taken.
    """
    _check_images(config, asked=config.alpha == "auto", what="--alpha auto")
    folder = RunPaths(config.output_dir, plain_name("--name", config.name)).checkpoints
    if folder.exists():
        raise InputError(f"{folder} exists: move it away, or choose another --name")
    vectors = [load_vector(path) for path in config.vectors]
    base = base_of(config.base, vectors, config.output_dir)
    alpha = config.alpha
    if alpha == "auto":
        total = weighted_sum(vectors, [1.0] * len(vectors), "sum")
        alpha = validated_alpha(base, config.base, total, config, console)
    edited = apply(base.model, *vectors, alpha=alpha)
    said = {"base": config.base, "alpha": alpha, "vectors": [vector.fingerprint for vector in vectors]}
    return [save_edited(base, edited, folder, said)]


def negate(config: VectorNegateConfig) -> list[Path]:
    """Write the negative of a vector; InputError for a file that exists."""
    return _written(config.name, config.output_dir, lambda: -load_vector(config.vector))


def merged(config: VectorMergeConfig, console: Console) -> list[Path]:
    """Write one vector of several, scaled by alpha.

    Raises InputError for vectors of other bases, options that are of another method, and a file that exists.
    """
    for name, method in OF_METHOD.items():
        value = getattr(config, name)
        if value != VectorMergeConfig.model_fields[name].default and config.method != method:
            raise InputError(f"--{name} {value}: is of --method {method}, not of {config.method}; leave it out")
    if config.method in SUMS:
        raise InputError(
            f"--method {config.method}: weighs by {SUMS[config.method]} of clients' images, which vectors do not "
            f"hold; give it to a run (federated --merge {config.method}), or call ft.merge in Python"
        )
    _check_images(config, asked=config.alpha == "auto", what="--alpha auto")
    if config.alpha != "auto" and config.base is not None:
        raise InputError(f"--base {config.base}: is of --alpha auto; give that, or leave it out")
    if config.alpha == "auto" and config.base is None:
        raise InputError(
            "--alpha auto: is chosen by accuracy on validation images; give --base, what the vectors change"
        )

    def of_all() -> TaskVector:
        found = merge(
            [load_vector(path) for path in config.vectors],
            config.method,
            share=config.share,
            drop=config.drop,
            seed=config.seed,
            votes=config.votes,
            selectivity=config.selectivity,
            first=config.first,
            last=config.last,
        )
        alpha = config.alpha
        if alpha == "auto":
            source = str(config.base)
            alpha = validated_alpha(base_of(source, [found], config.output_dir), source, found, config, console)
        return (
            found if alpha == 1 else changed(found, scaled(found.values, alpha), f"{alpha:g} x {found.facts.command}")
        )

    return _written(config.name, config.output_dir, of_all)


def _check_images(config: ValidationOptions, *, asked: bool, what: str) -> None:
    """Refuse options on validation images where nothing looks at any; ``what`` would."""
    for name in () if asked else OF_IMAGES:
        if (value := getattr(config, name)) is not None:
            raise InputError(f"--{name} {value}: is of {what}; give that, or leave it out")


def _written(name: str, output_dir: Path, vector: Callable[[], TaskVector]) -> list[Path]:
    """Write a vector under a new name, which is looked at before anything is computed."""
    path = RunPaths(output_dir, plain_name("--name", name)).vector
    if path.exists():
        raise InputError(f"{path} exists: move it away, or choose another --name")
    save_vector(path, vector())
    return [path]
