"""The README, the documentation's lines and the examples: complete, in step with each other, and runnable."""

import json
import re
import runpy
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import fedtalos as ft

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "fedtalos"
EXAMPLE, VECTORS = (ROOT / "examples" / name for name in ("cifar100_federated.py", "task_vectors.py"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def lines_of_code(page: str) -> str:
    """What a page's fenced Python says, as one script."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_the_readme_has_the_commands_and_the_lines():
    readme = read("README.md")
    for command in (
        "python main.py centralized --model_size small --num_epochs 100",
        "python main.py federated --num_clients 100 --num_rounds 100",
        "python main.py editing --target_sparsity 0.9 --num_iterations 10",
        "make demo",
        "make test",
    ):
        assert command in readme
    assert ft.__doc__ is not None
    lines = textwrap.dedent(ft.__doc__.split("\n\n", 1)[1]).rstrip()
    for page in (readme, read("docs/index.md")):
        assert textwrap.indent(lines, "    ") in page


def test_the_readmes_map_names_every_module():
    """As often as there are modules of a name, and none that is not there."""
    shown = read("README.md").partition("## Where is everything?")[2].partition("\n## ")[0]
    named = Counter(
        re.findall(r"^ +(\w+\.py) ", shown.partition("src/fedtalos/\n")[2].partition("\n    docs/")[0], re.M)
    )
    there = Counter(path.name for path in SRC.rglob("*.py") if path.parent == SRC or path.name != "__init__.py")
    assert (there - named, named - there) == (Counter(), Counter()), "not in the map; in the map alone"
    packages = {path.parent.relative_to(SRC).as_posix() for path in SRC.rglob("*.py")} - {"."}
    assert all(f"{package.rpartition('/')[2]}/ " in shown for package in packages)


def test_every_public_name_has_its_place_in_the_documentation():
    documented = re.findall(r"^::: fedtalos\.(\w+)$", read("docs/api.md"), re.MULTILINE)
    assert sorted(documented) == sorted(name for name in ft.__all__ if name != "__version__")


def test_every_page_is_in_the_sites_navigation():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": (\w+\.md)$", read("mkdocs.yml"), re.MULTILINE)) == pages


@pytest.fixture
def without_windows():
    """Figures go to files alone, and none stays open."""
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.mark.parametrize("page", ["docs/library.md", "docs/tutorial.md"])
def test_the_lines_of_a_page_run(page, tmp_path, monkeypatch, capsys, without_windows):
    """With a few rounds only: whether they run is asked here, not what they come to."""
    monkeypatch.chdir(tmp_path)
    script = Path("lines.py")
    script.write_text(re.sub(r"\b(rounds|epochs)=\d+", r"\1=2", lines_of_code(read(page))), encoding="utf-8")
    runpy.run_path(str(script))
    assert capsys.readouterr().out


@pytest.mark.parametrize("example", [EXAMPLE, VECTORS], ids=lambda path: path.stem)
def test_the_notebook_is_its_script(example):
    make = runpy.run_path(str(ROOT / "examples" / "make_notebook.py"))
    script = example.read_text(encoding="utf-8")
    found = json.loads(example.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert found == json.loads(make["notebook"](script)), "run: python examples/make_notebook.py"
    code = "".join("".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code")
    said = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert [line for line in code.splitlines() if line and not line.startswith("#")]
    assert all(line in code for line in said)


@pytest.mark.draws
def test_the_notebooks_lines_run(tmp_path, monkeypatch, capsys, without_windows):
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATASET": "digits", "MODEL": "micro", "IMAGE_SIZE": "8", "ROUNDS": "1"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(EXAMPLE))
    said = capsys.readouterr().out
    assert [word in said for word in ("everything: test", "TaLoS, 10 %: test", "random, 10 %: test")] == [True] * 3
    assert (tmp_path / "plots" / "cifar100_federated.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.draws
def test_what_the_notebook_of_task_vectors_says_is_so(tmp_path, monkeypatch, capsys, without_windows):
    """Adding both vectors and a head that fits beat the base; subtracting gives it back; one task is forgotten."""
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(VECTORS))
    said, rows = capsys.readouterr().out, {name: sum(row) / len(row) for name, row in found["rows"].items()}
    assert rows["sum, head fitted anew"] > rows["base"]
    assert rows["one round"] > rows["base"]
    forgot = next(row for name, row in found["rows"].items() if name.startswith("less the second"))
    assert forgot[1] < found["rows"]["sum, head fitted anew"][1] - 0.3
    assert found["error"] < 1e-6
    assert "MB up" in said
    assert (tmp_path / "plots" / "task_vectors.png").stat().st_size > 10_000
