"""Writes every NAME.ipynb from its NAME.py in the percent format: python examples/make_notebook.py."""

import json
import re
from pathlib import Path
from typing import Any


def cells(script: str) -> list[dict[str, Any]]:
    """Cells of a script in which `# %%` opens a cell of code and `# %% [markdown]` one of text."""
    found = []
    for kind, text in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.MULTILINE | re.DOTALL):
        lines = text.strip().splitlines()
        if kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cell: dict[str, Any] = {"cell_type": "markdown" if kind else "code", "metadata": {}, "source": source}
        found.append(cell if kind else {**cell, "execution_count": None, "outputs": []})
    return found


def notebook(script: str) -> str:
    """The notebook of a script, as JSON."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells(script), "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in Path(__file__).parent.glob("*.py"):
        if "# %%\n" in (script := path.read_text(encoding="utf-8")) and path.name != "make_notebook.py":
            path.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")
