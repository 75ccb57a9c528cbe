"""The command line: flags over preset over file over defaults, to one experiment; bad input is one sentence, exit 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, cast

import tyro
import yaml
from pydantic import ValidationError
from rich.console import Console

from fedtalos.config import (
    OTHERS,
    RUN_CONFIGS,
    CentralizedConfig,
    DemoConfig,
    EditingConfig,
    EvaluateConfig,
    FederatedConfig,
    InfoConfig,
    PlotConfig,
    RunConfig,
)
from fedtalos.config_files import from_file, from_preset, override, sentence
from fedtalos.errors import InputError
from fedtalos.recorder import require_tracker
from fedtalos.training.local import TrainingError

AnyConfig = RunConfig | EvaluateConfig | PlotConfig | DemoConfig | InfoConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 for bad input, 1 where training failed, 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    errors = Console(stderr=True)
    try:
        dispatch(parse(arguments), Console())
    except InputError as error:
        errors.print(f"fedtalos: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except TrainingError as error:
        errors.print(f"fedtalos: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(arguments: list[str]) -> AnyConfig:
    """The config that the arguments ask for.

    Raises InputError for a bad file, preset or value; tyro prints and exits with 2 for unknown flags.
    """
    command = arguments[0] if arguments else None
    subcommands: list[Any] = []
    for name, run_config in RUN_CONFIGS.items():
        default = defaults(name, arguments[1:]) if name == command else run_config()
        subcommands.append(Annotated[run_config, tyro.conf.subcommand(name, default=default)])
    for other in OTHERS:
        subcommands.append(Annotated[other, tyro.conf.subcommand(other.command)])
    try:
        parsed = tyro.cli(
            cast(type[AnyConfig], Union[tuple(subcommands)]),  # noqa: UP007
            prog="fedtalos",
            description="Sparse, task-localised federated fine-tuning of Vision Transformers.",
            args=arguments,
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except ValidationError as error:
        raise InputError(sentence(error)) from error
    return parsed


def defaults(command: str, arguments: list[str]) -> RunConfig:
    """The config that --preset and --config give, before the flags."""
    early = argparse.ArgumentParser(prog=f"fedtalos {command}", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--preset")
    chosen, _ = early.parse_known_args(arguments)
    config = RUN_CONFIGS[command]()
    if chosen.config is not None:
        config = override(config, from_file(chosen.config, command), str(chosen.config))
    if chosen.preset is not None:
        config = override(config, from_preset(chosen.preset, command), f"preset {chosen.preset!r}")
    return config


def dispatch(config: AnyConfig, console: Console) -> None:
    """Run the command that the config is for."""
    match config:
        case CentralizedConfig() | FederatedConfig() | EditingConfig():
            run_experiment(config, console)
        case EvaluateConfig():
            from fedtalos.experiments import evaluate

            evaluate.run(config, console)
        case PlotConfig():
            from fedtalos.experiments import plots

            show_paths(plots.run(config), console)
        case DemoConfig():
            from fedtalos.experiments import demo

            demo.run(config, console)
        case InfoConfig():
            from fedtalos.experiments import info

            info.run(config, console)


def run_experiment(config: RunConfig, console: Console) -> None:
    """Train or edit, draw the figures, and say where everything is."""
    from fedtalos.experiments import centralized, editing, federated, plots
    from fedtalos.experiments.runs import choose_run

    require_tracker(config.run.tracker)
    paths = choose_run(config)
    if paths.finished:
        console.print(f"{paths.name} is finished already: {paths.results / 'summary.yaml'}", highlight=False)
        return
    console.print(f"{config.command}: run {paths.name}", highlight=False)
    try:
        match config:
            case CentralizedConfig():
                summary = centralized.run(config, paths, console)
            case FederatedConfig():
                summary = federated.run(config, paths, console)
            case EditingConfig():
                summary = editing.run(config, paths, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command with --resume --run_name {paths.name} goes on", highlight=False)
        raise
    if isinstance(config, EditingConfig):
        drawn = plots.plot_masks([paths.mask], paths.plots)
    else:
        drawn = plots.plot_run(paths.results, paths.plots)
    console.print(yaml.safe_dump(summary, sort_keys=False).rstrip(), highlight=False)
    show_paths([paths.results, paths.checkpoints, *drawn], console)


def show_paths(paths: Sequence[Path], console: Console) -> None:
    """One path a line, unwrapped, so that it can be copied."""
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)
