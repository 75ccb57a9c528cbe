"""The library's public face: names, docstrings, the quickstart."""

import ast
import importlib
import inspect
import runpy
from pathlib import Path

import pytest

import fedtalos as ft

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "fedtalos"
RIDDLES = ("What ", "How ", "Of ", "As ", "Where ", "Whether ", "When ", "Those ")


def docstrings():
    """Every public docstring, by where it stands."""
    for path in sorted(SRC.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield path.relative_to(SRC).as_posix(), ast.get_docstring(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(SRC)}: {node.name}", ast.get_docstring(node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                yield f"{path.relative_to(SRC)}:{node.lineno}", str(node.value.value)  # of an attribute


def test_docstrings_open_with_a_verb_or_a_noun():
    riddling = [where for where, text in docstrings() if text and text.startswith(RIDDLES)]
    assert not riddling


@pytest.mark.parametrize("name", [name for name in ft.__all__ if not name.startswith("__")])
def test_public_names_have_an_example(name):
    thing = getattr(ft, name)
    text = inspect.getdoc(thing)
    assert text, name
    assert ">>>" in text, f"{name} has no example"


def test_the_package_shows_what_is_public_to_people_and_to_type_checkers():
    assert set(ft.__all__) == set(dir(ft)) == {*ft._HOMES, "__version__"}
    tree = ast.parse((SRC / "__init__.py").read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.col_offset]
    for node in imported:
        for alias in node.names:
            assert node.module == f"fedtalos.{ft._HOMES[alias.name]}"
            assert getattr(ft, alias.name) is getattr(importlib.import_module(node.module), alias.name)
    assert sum(len(node.names) for node in imported) == len(ft._HOMES)
    assert ">>>" in ft.__doc__ or "import fedtalos as ft" in ft.__doc__


def test_the_quickstart_is_short_and_learns(capsys):
    path = ROOT / "examples" / "quickstart.py"
    statements = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    assert len(statements) <= 17
    runpy.run_path(str(path))
    said = capsys.readouterr().out.splitlines()
    before, after = (float(line.split()[1]) for line in (said[0], said[-1]))
    assert after > before > 0.5
