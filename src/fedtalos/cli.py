"""The command line: flags over preset over file over defaults, to one experiment; bad input is one sentence, exit 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, cast

import torch
import tyro
import yaml
from rich.console import Console

from fedtalos.app.config.checks import check_together
from fedtalos.app.config.files import from_file, from_preset, nearest, override
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, EditingConfig, FederatedConfig, RunConfig
from fedtalos.app.config.tools import (
    MASK_TOOLS,
    OTHERS,
    DemoConfig,
    EvaluateConfig,
    InfoConfig,
    MaskConfig,
    PlotConfig,
    SweepConfig,
)
from fedtalos.app.run import interruption
from fedtalos.app.run.folders import choose_run, claimed, run_to_resume
from fedtalos.app.run.interruption import Interrupted
from fedtalos.app.run.recorder import require_tracker
from fedtalos.errors import InputError
from fedtalos.training.loop import TrainingError
from fedtalos.training.micro_batches import out_of_memory

OUT_OF_MEMORY = (
    "the device's memory ran out (training had halved its batches as far as that goes); take a smaller --model_size or "
    "--image_size, let less move, or lower --eval_batch_size, --clients_at_once or, in editing, --fisher_chunk"
)

AnyConfig = RunConfig | EvaluateConfig | PlotConfig | MaskConfig | SweepConfig | DemoConfig | InfoConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 for bad input, 1 where training failed, 141 on a closed pipe.

    130 on Ctrl-C and 143 on SIGTERM, when what is done has been saved.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    errors = Console(stderr=True)
    try:
        with interruption.handled():
            dispatch(parse(arguments), Console())
    except InputError as error:
        complain(errors, str(error))
        sys.exit(2)
    except BrokenPipeError:  # `fedtalos ... | head`: nobody is left to read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        complain(errors, f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its rights")
        sys.exit(2)
    except TrainingError as error:
        complain(errors, str(error))
        sys.exit(1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        complain(errors, f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})")
        sys.exit(1)
    except Interrupted as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # asked twice
        sys.exit(130)


def parse(arguments: list[str]) -> AnyConfig:
    """The config that the arguments ask for.

    Raises InputError for a bad command, file, preset or value; tyro prints and exits with 2 for unknown flags.
    """
    command = arguments[0] if arguments else None
    check_known("command", arguments[:1], [*RUN_CONFIGS, *(other.command for other in OTHERS)])
    if command == MaskConfig.command:
        check_known("mask command", arguments[1:2], [tool.command for tool in MASK_TOOLS])
    subcommands: list[Any] = []
    for name, run_config in RUN_CONFIGS.items():
        default = defaults(name, arguments[1:]) if name == command else run_config()
        subcommands.append(Annotated[run_config, tyro.conf.subcommand(name, default=default)])
    for other in OTHERS:
        subcommands.append(Annotated[other, tyro.conf.subcommand(other.command)])
    parsed = tyro.cli(
        cast(type[AnyConfig], Union[tuple(subcommands)]),  # noqa: UP007
        prog="fedtalos",
        description="Sparse, task-localised federated fine-tuning of Vision Transformers.",
        args=arguments,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    if isinstance(parsed, RunConfig):
        check_together(parsed)
    return parsed


def check_known(what: str, words: list[str], known: list[str]) -> None:
    """InputError where a word that is no flag is not among the ``known``."""
    for word in words:
        if not word.startswith("-") and word not in known:
            raise InputError(f"no {what} {word!r}{nearest(word, known)} (there are {', '.join(known)})")


def defaults(command: str, arguments: list[str]) -> RunConfig:
    """The config before the flags: that of the run to resume, then --config, then --preset."""
    early = argparse.ArgumentParser(prog=f"fedtalos {command}", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--preset")
    early.add_argument("--resume", action="store_true")
    early.add_argument("--run_name", "--run-name")
    early.add_argument("--output_dir", "--output-dir")
    chosen, _ = early.parse_known_args(arguments)
    layers: list[tuple[str, dict[str, Any]]] = []
    if chosen.config is not None:
        layers.append((str(chosen.config), from_file(chosen.config, command)))
    if chosen.preset is not None:
        layers.append((f"preset {chosen.preset!r}", from_preset(chosen.preset, command)))
    if chosen.resume:
        said = {key: value for _, values in layers for key, value in values.items()}
        root = Path(chosen.output_dir or said.get("output_dir", "."))
        paths = run_to_resume(root, chosen.run_name or said.get("run_name"), command)
        if paths is not None:
            layers.insert(0, (str(paths.config), {**from_file(paths.config, command), "run_name": paths.name}))
    config = RUN_CONFIGS[command]()
    for source, values in layers:
        config = override(config, values, source)
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
            from fedtalos.experiments import plot

            for path in plot.run(config):
                say(console, str(path))
        case MaskConfig():
            from fedtalos.experiments import mask as mask_tools

            for path in mask_tools.run(config.tool, console):
                say(console, str(path))
        case SweepConfig():
            from fedtalos.experiments import sweep

            for path in sweep.run(config, console, run_experiment):
                say(console, str(path))
        case DemoConfig():
            from fedtalos.experiments import demo

            demo.run(config, console)
        case InfoConfig():
            from fedtalos.experiments import info

            info.run(config, console)


def run_experiment(config: RunConfig, console: Console) -> None:
    """Train or edit, draw the figures, and say where everything is."""
    from fedtalos.app.figures import draw as plots
    from fedtalos.app.run import launch as processes
    from fedtalos.experiments import centralized, editing, federated

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if processes.rank() and isinstance(config, FederatedConfig):
        federated.follow(config)
        return
    if not isinstance(config, FederatedConfig):
        processes.check_alone(config.command)
    require_tracker(config.run.tracker)
    paths = choose_run(config)
    if paths.finished:
        say(console, f"{paths.name} is finished already: {paths.results / 'summary.yaml'}")
        return
    how = "goes on" if paths.started else "begins"
    say(console, f"{config.command}: run {paths.name} {how}")
    try:
        with claimed(paths):
            match config:
                case CentralizedConfig():
                    summary = centralized.run(config, paths, console)
                case FederatedConfig():
                    summary = federated.run(config, paths, console)
                case EditingConfig():
                    summary = editing.run(config, paths, console)
            if isinstance(config, EditingConfig):
                drawn = plots.plot_masks([paths.mask], paths.plots) + plots.plot_iterations(paths.results, paths.plots)
            else:
                drawn = plots.plot_run(paths.results, paths.plots)
    except (Interrupted, KeyboardInterrupt):
        place = "" if paths.root == Path() else f" --output_dir {paths.root}"
        say(console, f"stopped; fedtalos {config.command} --resume --run_name {paths.name}{place} goes on")
        raise
    say(console, yaml.safe_dump(summary, sort_keys=False).rstrip())
    for path in [paths.results, paths.checkpoints, *drawn]:
        say(console, str(path))


def complain(console: Console, text: str) -> None:
    """Say what is wrong, on one line."""
    say(console, "fedtalos: " + text.replace("\n", " "))


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is: not wrapped, so that paths can be copied, not coloured, nothing in it read as markup.

    What a terminal would act on, or cannot show, is spelled out: names in files may come from strangers.
    """
    plain = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    console.print(plain, highlight=False, markup=False, soft_wrap=True)
