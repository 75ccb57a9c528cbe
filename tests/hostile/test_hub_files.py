"""Files of the Hugging Face hub: what is said of them is looked at before they are fetched."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from limits import refused

from fedtalos.models.weights.hub import _bar_up_to, download
from fedtalos.models.weights.pixels import MOST_BYTES

REVISION = "0123456789abcdef0123456789abcdef01234567"
NO_NAMES = [None, "", "../../../../x", "/etc/x", "..", ".x", "a/b", "a\\b", "a\0b", "\x1b[2J", "é" * 300, "x" * 201]
SIZES = {"a stated size": None, "no end": 10**18, "more than the memory": 2**45}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub says of the weights and of the files beside them; fetching is noted."""
    said = {"weights": SimpleNamespace(size=9, etag="abc", commit_hash=REVISION)}
    said["beside"] = SimpleNamespace(size=9, etag="abc", commit_hash=REVISION)
    said["fetched"] = []

    def metadata(url: str) -> SimpleNamespace:
        return said["beside" if url.endswith(".json") else "weights"]

    def fetch(repo: str, name: str, **_: object) -> str:
        said["fetched"].append(name)
        return str(tmp_path / REVISION / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return said


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("what", ["etag", "commit_hash"])
def test_names_that_become_paths_are_looked_at(what, name, hub):
    setattr(hub["weights"], what, name)
    with refused("o/r/model.safetensors comes without"):
        download("o/r")
    assert hub["fetched"] == []


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_weights_that_no_memory_holds_are_not_fetched(size, hub):
    hub["weights"].size = size
    with refused("o/r/model.safetensors"):
        download("o/r")
    assert hub["fetched"] == []


def test_files_beside_weights_have_a_limit(hub):
    hub["beside"].size = MOST_BYTES
    assert len(download("o/r").configs) == 2
    hub["beside"].size = MOST_BYTES + 1
    with refused("o/r/preprocessor_config.json holds 8388609 bytes"):
        download("o/r")
    assert hub["fetched"][3:] == ["model.safetensors"]


def test_a_body_without_end_is_left():
    """Servers may say one size and send another, or packed bytes."""
    with refused("o/r/x.bin is longer than it was said to be"), _bar_up_to(10, "o/r/x.bin")(disable=True) as bar:
        bar.update(5)
        bar.update(5)
        bar.update(1)
