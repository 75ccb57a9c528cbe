"""Write a page about runs: one HTML file that can be sent, read on a phone and printed."""

from rich.console import Console

from fedtalos.app.config.report import ReportConfig
from fedtalos.app.config.tools import EvaluateConfig
from fedtalos.app.figures.draw import name_together
from fedtalos.app.report.contents import Report, read_records, report_of
from fedtalos.app.report.grid import read_grid_results, report_of_grid
from fedtalos.app.report.mistakes import MOST_CLASSES, Classes, classes_of
from fedtalos.app.report.page import write_report
from fedtalos.app.run.display import say
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.runs import check_one_data_set, is_sweep, named_run, run_folder
from fedtalos.errors import InputError
from fedtalos.experiments.evaluate import on_a_split
from fedtalos.training.confusion import confusion


def run(config: ReportConfig, console: Console) -> None:
    """Write plots/RUN/report.html, or that of a sweep or of several runs, and print its place."""
    if not config.runs:
        raise InputError("report: expected a run's name, several, or a sweep's; `fedtalos runs` lists them")
    folders = [run_folder(path, config.output_dir / "results") for path in config.runs]
    if any(map(is_sweep, folders)):
        if len(folders) > 1:
            raise InputError("report: a sweep has a page of its own; name it alone")
        name, report = folders[0].resolve().name, report_of_grid(*read_grid_results(folders[0]))
    else:
        name, report = of_runs(config)
    folder = config.output_dir / "plots" / (name if config.name is None else plain_name("--name", config.name))
    say(console, str(write_report(folder / "report.html", report)))


def of_runs(config: ReportConfig) -> tuple[str, Report]:
    """Gather the report of one run or several, of one data set, and its name."""
    every = [named_run(path, config.output_dir) for path in config.runs]
    if len({paths.results.resolve() for paths in every}) < len(every):
        raise InputError("report: expected different runs, got one of them twice; leave it out")
    check_one_data_set([paths.results for paths in every])
    runs = [read_records(paths) for paths in every]
    classes = look_at_classes(config, every[0]) if len(runs) == 1 and config.classes else None
    return name_together([paths.name for paths in every]), report_of(runs, classes)


def look_at_classes(config: ReportConfig, paths: RunPaths) -> Classes:
    """Let the run's last model answer to the split, and gather its mistakes.

    Raises InputError where the run's images are not at hand, or of too many classes.
    """
    last = paths.checkpoints / "last.json"
    options = {key: getattr(config, key) for key in ("split", "eval_limit", "data_dir", "device", "output_dir")}
    subject = on_a_split(EvaluateConfig(checkpoint=last, **options))
    if len(subject.classes) > MOST_CLASSES:
        raise InputError(
            f"report: {len(subject.classes)} classes are too many for a page; --no_classes leaves them out"
        )
    found = confusion(subject.model, subject.images, batch_size=subject.batch_size, precision=subject.precision)
    return classes_of(found, subject.images, subject.classes, subject.part)
