"""Imports point down only, and the library needs nothing that only a program needs."""

import ast
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src" / "fedtalos"

LAYERS = (
    ("__main__",),
    ("cli",),
    ("experiments",),
    ("fleet",),
    ("app",),
    ("training.federated", "training.editing"),
    ("training",),
    ("models", "data"),
    (
        "errors",
        "randomness",
        "metrics",
        "files",
        "facts",
        "tensor_file",
        "checkpoint",
        "devices",
        "progress",
        "notes",
        "_version",
    ),
)
"""From the top down. What stands in one layer does not import each other, but for the ground, which is one floor."""

GROUND = set(LAYERS[-1])
OF_THE_PROGRAM = {"pydantic", "tyro", "rich", "yaml", "matplotlib"}
PROGRAM = {"app", "experiments", "cli", "fleet", "__main__"}
SCHEMAS = {"facts": {"pydantic"}}
"""The one module of the library that needs something of the program's: it checks facts that files state. It imports it
when the first such file is read."""


def part(module: str) -> str:
    """The name in LAYERS that a module belongs to: the longest that it begins with."""
    names = [name for layer in LAYERS for name in layer if module == name or module.startswith(f"{name}.")]
    assert names, f"{module} is in no layer"
    return max(names, key=len)


def floor(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def modules() -> dict[str, Path]:
    """Every module but the package's own __init__, which names what is public."""
    found = {}
    for path in SRC.rglob("*.py"):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules that a file imports, ours without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(inside) if node.module == "fedtalos" else {node.module, *inside}
    return found


def test_imports_point_down_only():
    known = modules()
    for name, path in known.items():
        ours = {found.removeprefix("fedtalos.") for found in imports(path) if found.startswith("fedtalos.")}
        for other in ours & known.keys():
            here, there = part(name), part(other)
            same = here == there or (here in GROUND and there in GROUND)
            assert same or floor(there) > floor(here), f"{name} imports {other}"


def test_the_library_needs_nothing_that_only_a_program_needs():
    for name, path in modules().items():
        if name.split(".")[0] not in PROGRAM:
            found = {module.split(".")[0] for module in imports(path)} & OF_THE_PROGRAM - SCHEMAS.get(name, set())
            assert not found, f"{name} imports {found}"


def test_importing_the_library_imports_no_schemas():
    code = "import sys, fedtalos.facts, fedtalos.checkpoint, fedtalos.files; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
