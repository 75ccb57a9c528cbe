"""The library's public face: names, docstrings, the quickstart."""

import ast
import copy
import importlib
import inspect
import runpy
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import fedtalos as ft
from fedtalos.data.images import LabelledImages

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


def takes_words(annotation: object) -> bool:
    return any(get_origin(part) is Literal for part in (annotation, *get_args(annotation)))


def parameters_that_take_words() -> set[tuple[str, str]]:
    things = {name: getattr(ft, name) for name in ft.__all__ if not name.startswith("__")}
    hints = {
        name: typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
        for name, thing in things.items()
        if callable(thing)
    }
    return {(name, one) for name, found in hints.items() for one, hint in found.items() if takes_words(hint)}


def drawn(rounds: Any) -> None:
    next(iter(rounds))


def a_vector(model: Any) -> ft.TaskVector:
    trained = copy.deepcopy(model)
    trained.head.bias.data += 1
    return ft.task_vector(model, trained)


LOCAL = ft.LocalTraining(steps=1)
Call = Callable[[Any, LabelledImages, Any], object]
"""Of a model, images and a keyword with a word that is none."""
CALLS: dict[str, Call] = {
    "LocalTraining": lambda _model, _images, word: ft.LocalTraining(**word),
    "Schedule": lambda _model, _images, word: ft.Schedule(1e-3, 10, **word),
    "attacked": lambda _model, _images, word: ft.attacked(attackers=[0], **word),
    "class_groups": lambda _model, _images, word: ft.class_groups("abcde", 2, **word),
    "combine_masks": lambda model, _images, word: ft.combine_masks([ft.random_mask(model)] * 2, **word),
    "confusion": lambda model, images, word: ft.confusion(model, images, **word),
    "disentanglement_error": lambda model, images, word: ft.disentanglement_error(
        model, [a_vector(model)] * 2, [images] * 2, **word
    ),
    "eligible_entries": lambda model, _images, word: ft.eligible_entries(model, **word),
    "evaluate": lambda model, images, word: ft.evaluate(model, images, **word),
    "export_model": lambda model, _images, word: ft.export_model(model, tuple("abcde"), "exported", **word),
    "fedavg": lambda model, images, word: drawn(
        ft.fedavg(model, ft.split_clients(images, 2), local=LOCAL, rounds=1, **word)
    ),
    "fisher_scores": lambda model, images, word: ft.fisher_scores(
        model, ft.scored_batches(model, images), ft.random_mask(model), **word
    ),
    "fit_head": lambda model, images, word: ft.fit_head(model, images, val=images, **word),
    "load_model": lambda model, _images, word: ft.load_model("micro", tuple("abcde"), pretrained=False, **word),
    "magnitude_mask": lambda model, _images, word: ft.magnitude_mask(model, **word),
    "merge": lambda model, _images, word: ft.merge([a_vector(model)], **word),
    "one_shot": lambda model, images, word: ft.one_shot(
        model, ft.split_clients(images, 2), local=LOCAL, val=images, alpha=1.0, **word
    ),
    "random_mask": lambda model, _images, word: ft.random_mask(model, **word),
    "split_by_task": lambda _model, images, word: ft.split_by_task(images, 2, ((0, 1), (2, 3, 4)), **word),
    "split_clients": lambda _model, images, word: ft.split_clients(images, 2, **word),
    "talos_mask": lambda model, images, word: ft.talos_mask(model, images, **word),
    "train_apart": lambda model, images, word: drawn(
        ft.train_apart(model, ft.split_clients(images, 2), local=LOCAL, keep=lambda *_: None, **word)
    ),
    "train_centralized": lambda model, images, word: drawn(
        ft.train_centralized(model, images, local=LOCAL, epochs=1, **word)
    ),
}
"""A call of every public name with a parameter that takes one of several words."""


@pytest.mark.parametrize(("name", "parameter"), sorted(parameters_that_take_words()))
def test_a_word_that_is_none_of_those_it_may_be_is_refused(name, parameter, vit):
    vit.head_source = "ridge"
    images = LabelledImages(torch.arange(10 * 3 * 64, dtype=torch.uint8).view(10, 3, 8, 8), torch.arange(10) % 5)
    with pytest.raises(ft.InputError, match=r"'SGDW'.*(expected|choose)"):
        CALLS[name](vit, images, {parameter: "SGDW"})
