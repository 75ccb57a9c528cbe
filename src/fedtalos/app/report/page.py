"""The report as one HTML file, which asks nothing of anywhere."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fedtalos.app.figures.style import COLOURS
from fedtalos.app.report.contents import (
    Report,
    client_accuracies,
    config_text,
    curves,
    densities_of,
    files_of,
    headlines,
    split_of,
)
from fedtalos.errors import InputError
from fedtalos.files import refuse_link, write_atomic

LARGEST = 2_000_000
"""Bytes of a page: one that is sent by mail."""


def write_report(path: Path, report: Report) -> Path:
    """Write the page; InputError where so many runs make it too large.

    >>> write_report(Path("report.html"), report_of([read_records(paths)]))
    PosixPath('report.html')
    """
    refuse_link(path.parent)
    content = page(report).encode(errors="backslashreplace")  # paths may hold what is no character
    if len(content) > LARGEST:
        raise InputError(f"report: {len(content) / 1e6:.1f} MB are more than a page can be sent with; name fewer runs")
    write_atomic(path, content)
    return path


def page(report: Report) -> str:
    """Render the page. Everything that comes from files is escaped: by Jinja2, and within the script's data by JSON."""
    here = files("fedtalos.app.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    run = report.single
    return environment.from_string((here / "page.html").read_text("utf-8")).render(
        report=report,
        style=(here / "page.css").read_text("utf-8"),
        script=(here / "page.js").read_text("utf-8"),
        data=_json({"methods": [curves(method) for method in report.methods], "colours": COLOURS}),
        headlines=[(method, headlines(method)) for method in report.methods],
        run=run,
        split=None if run is None else split_of(run),
        densities=None if run is None else densities_of(run),
        clients=None if run is None else client_accuracies(run),
        config=None if run is None else config_text(run),
        files=[] if run is None else files_of(run),
    )


def _json(content: dict[str, Any]) -> str:
    """Write JSON that cannot end the script element that it stands in."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
