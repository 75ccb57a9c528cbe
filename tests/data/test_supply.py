"""What the program reads and fetches, held by reading its source: no pickle runs, every download is checked."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from fedtalos.data import downloads

ROOT = Path(__file__).parents[2]
SOURCES = {str(path.relative_to(ROOT / "src")): path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "pynvml": "nvidia-ml-py"}
"""What is imported under another name than it is installed by."""


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """File, what is called as it is written, and the call."""
    found = [(file, node) for file, text in SOURCES.items() for node in ast.walk(ast.parse(text))]
    return [(file, ast.unparse(node.func), node) for file, node in found if isinstance(node, ast.Call)]


def option(call: ast.Call, name: str) -> object:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def imported() -> dict[str, set[str]]:
    """Top-level module -> the files that import it."""
    found: dict[str, set[str]] = {}
    for file, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file)
    return found


def test_torch_files_are_read_as_tensors_only():
    loads = [(file, option(call, "weights_only")) for file, name, call in calls() if name == "torch.load"]
    assert loads == 2 * [("fedtalos/models/weights/state_dicts.py", "True")]


def test_pickle_is_used_by_the_restricted_reader_only():
    modules = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    assert {name: files for name, files in imported().items() if name in modules} == {
        "pickle": {"fedtalos/data/cifar.py"}
    }
    used = set(re.findall(r"pickle\.(\w+)", SOURCES["fedtalos/data/cifar.py"]))
    assert used == {"_Unpickler", "UnpicklingError"}
    assert [option(call, "allow_pickle") for _, name, call in calls() if name == "np.load"] == ["False"]


def test_nothing_that_is_read_is_run():
    run = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    assert [(file, name) for file, name, _ in calls() if name in run] == []
    assert not [file for file, _, call in calls() if option(call, "shell") or option(call, "trust_remote_code")]
    # git, for the commit; Flower's own programs. Workers are started by torch (app/run/launch.py)
    flower = {"fedtalos/fleet/commands.py", "fedtalos/fleet/processes.py"}
    assert imported()["subprocess"] == {"fedtalos/app/run/recorder.py", *flower}
    loaders = {name for _, name, _ in calls() if name.startswith("yaml.") and "Loader" in name}
    assert loaders == {"yaml.SafeLoader"}


def test_tables_are_read_and_files_are_written_in_one_place():
    """There, rows are counted and links are not followed. A run's own rows are read again, once they were counted."""
    tables = {(file, name) for file, name, _ in calls() if name in ("csv.reader", "csv.DictReader")}
    assert tables == {("fedtalos/facts.py", "csv.reader"), ("fedtalos/app/run/recorder.py", "csv.reader")}
    modes = {(file, str(mode)) for file, name, call in calls() for mode in opening(name, call)}
    written = {(file, mode) for file, mode in modes if set(mode) & set("wax+")}
    assert written == {("fedtalos/fleet/processes.py", "'ab'")}  # what Flower's programs say


def opening(name: str, call: ast.Call) -> list[object]:
    """Mode of a call that opens a file, as it is written; of files.py's own no more than its caller's is known."""
    if name == "open" or (name.endswith(".open") and not name.startswith(("os.", "Image.", "gzip.", "tarfile."))):
        return [ast.unparse(arg) for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def test_every_address_is_https():
    addresses = {address for text in SOURCES.values() for address in re.findall(r"\w+://[^\s\"')]+", text)}
    assert "https://www.cs.toronto.edu/~kriz/" in addresses
    local = {address for address in addresses if re.match(r"(tcp|file|sqlite)://", address)}  # on this machine
    assert [address for address in addresses - local if not address.startswith("https://")] == []


def test_every_download_is_checked():
    fetches = {
        (file, name)
        for file, name, _ in calls()
        if re.search(
            r"requests\.\w+$|urlopen|urlretrieve|pooch\.\w+$|download_url|load_state_dict_from_url|hf_hub_download|snapshot_download|torch\.hub\.load",
            name,
        )
    }
    assert fetches == {
        ("fedtalos/data/downloads.py", "pooch.create"),
        ("fedtalos/data/downloads.py", "pooch.get_logger"),
        ("fedtalos/data/downloads.py", "requests.get"),  # pooch's downloader
        ("fedtalos/data/downloads.py", "requests.ConnectionError"),
        (
            "fedtalos/models/weights/hub.py",
            "hf_hub_download",
        ),  # the hub's own, whose sha256 goes into the run's config.yaml
        ("fedtalos/models/weights/library.py", "torch.hub.download_url_to_file"),
    }
    registries = [option(call, "registry") for _, name, call in calls() if name == "pooch.create"]
    assert registries == ["dict(checksums)"]
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", checksum) for checksum in downloads.CHECKSUMS.values())
    (from_torch,) = [call for _, name, call in calls() if name == "torch.hub.download_url_to_file"]
    assert len(from_torch.args) == 3  # the third: the first digits of its checksum


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[;]", requirement)[0].strip().lower().replace("_", "-") for requirement in requirements}


def test_what_is_imported_is_declared_and_pinned():
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    declared = requirement_names(PROJECT["dependencies"]) | requirement_names(extras)
    pins = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    import sys

    foreign = imported().keys() - sys.stdlib_module_names - {"fedtalos"}
    assert {MODULES.get(name, name).lower().replace("_", "-") for name in foreign} <= declared
    unpinned = requirement_names(PROJECT["dependencies"]) - requirement_names(pins)
    assert unpinned == set()


@pytest.mark.parametrize("page", ["docs/promises.md", "SECURITY.md"])
def test_the_tests_that_a_promise_names_are_there(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text("utf-8"))
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text("utf-8") if test else (ROOT / file).exists()
