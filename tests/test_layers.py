"""Imports point down only (CONTRIBUTING.md has the layers)."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "fedtalos"
GROUND = {"errors", "randomness", "metrics", "parameters", "files", "interruption"}
MAY_IMPORT = {
    "models": GROUND | {"models"},
    "data": GROUND | {"data"},
    "training": GROUND - {"files"} | {"models", "data", "training"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedtalos."):
            found.add(node.module.removeprefix("fedtalos."))
        elif isinstance(node, ast.ImportFrom) and node.module == "fedtalos":
            found |= {alias.name for alias in node.names}
    return found


def test_packages_import_downwards_only():
    for package, allowed in MAY_IMPORT.items():
        for path in (SRC / package).glob("*.py"):
            above = {name for name in imports(path) if name.split(".")[0] not in allowed}
            assert not above, f"{path.name} imports {above}"


def test_ground_floor_imports_only_itself():
    for name in GROUND:
        assert imports(SRC / f"{name}.py") <= GROUND


def test_experiments_do_not_import_each_other():
    shared, may_call_others = (
        {
            "runs",
            "aggregation",
            "algorithms",
            "absence",
            "personal",
            "preparation",
            "setup",
            "clients",
            "grouping",
            "scoring",
            "moving",
            "session",
            "plots",
            "processes",
            "heads",
            "grids",
            "grid_plots",
            "speeds",
            "tables",
        },
        {"demo", "sweep", "estimates"},
    )
    for path in (SRC / "experiments").glob("*.py"):
        siblings = {n.split(".")[1] for n in imports(path) if n.startswith("experiments.")} - shared
        assert path.stem in may_call_others or not siblings, f"{path.name} imports {siblings}"


def test_only_the_command_line_knows_experiments():
    for path in SRC.glob("*.py"):
        if path.stem != "cli":
            assert not any(name.startswith(("experiments", "cli")) for name in imports(path)), path.name
