"""The hub as load_weights sees it, played by a local server."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import save

from fedtalos.checkpoint import load_checkpoint
from fedtalos.models.library_model import LibraryArchitecture, LibraryModel
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import read_mask_file

REVISION = "0123456789abcdef0123456789abcdef01234567"
ENDLESS = "100"
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
PRETRAINED = "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
DINO = "timm/vit_small_patch16_224.dino"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two requests of a download, OWNER/REPO/resolve/main or REVISION/FILE; it has nothing else."""

    files: ClassVar[dict[str, bytes]] = {}
    """By OWNER/REPO/FILE."""
    said: ClassVar[dict[str, dict[str, str]]] = {}
    """Headers that are none of the file's, in the same way; without a length, it is sent twenty thousand times."""
    asked: ClassVar[list[tuple[str, str]]] = []
    """HEAD or GET, and OWNER/REPO/FILE."""

    def do_HEAD(self) -> None:
        owner, repo, *resolved = self.path.removeprefix("/").split("/", 4)
        name = "/".join((owner, repo, *resolved[2:]))
        self.asked.append((self.command, name))
        content = self.files.get(name)
        self.send_response(404 if content is None else 200)
        if content is None:
            known = any(file.startswith(f"{owner}/{repo}/") for file in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        said = {"ETag": f'"{hashlib.sha1(content or b"").hexdigest()}"', "X-Repo-Commit": REVISION}
        said |= {"Content-Length": str(len(content or b""))} | self.said.get(name, {})
        for header in said.items():
            if self.command == "HEAD" or header != ("Content-Length", ENDLESS):
                self.send_header(*header)
        self.end_headers()
        self.content = (content or b"") * (20_000 if said["Content-Length"] == ENDLESS else 1)

    def do_GET(self) -> None:
        self.do_HEAD()
        with suppress(ConnectionError):  # who is not read
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    state = VisionTransformer(Architecture("micro", 16, 4, 10), torch_generator(0, "theirs")).state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    files = {
        f"{PRETRAINED}/model.safetensors": save(state),
        f"{PRETRAINED}/config.json": json.dumps({"pretrained_cfg": {"mean": MEAN, "std": STD}}).encode(),
        f"{DINO}/model.safetensors": save(state | {"norm.bias": torch.ones(96)}),
        "owner/bin/pytorch_model.bin": saved.getvalue(),
        "owner/bin/preprocessor_config.json": json.dumps({"image_mean": MEAN, "image_std": STD}).encode(),
        "owner/dino/checkpoints/best.pth": saved.getvalue(),
        "owner/empty/README.md": b"",
    }
    hostile = {"elsewhere": {"ETag": '"../../../../evil"'}, "huge": {"Content-Length": str(10**15)}}
    hostile["endless"] = {"Content-Length": ENDLESS}
    said = {f"owner/{name}/model.safetensors": headers for name, headers in hostile.items()}
    files |= dict.fromkeys(said, b"0" * 100)
    monkeypatch.setattr(Hub, "said", said)
    monkeypatch.setattr(Hub, "files", files)
    monkeypatch.setattr(Hub, "asked", [])
    return files


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


READ_IN_A_FRESH_PROCESS = """
import json, sys
from fedtalos.errors import InputError
from fedtalos.models.weights.read import load_weights
said = []
for source in sys.argv[1:]:
    try:
        weights = load_weights(source, "small")
        said.append([weights.source, weights.sha256, weights.mean])
    except InputError as refusal:
        said.append(str(refusal))
json.dump(said, sys.stdout)
"""

IMAGENET = [0.485, 0.456, 0.406]  # where the name says dino and no JSON file says otherwise
FOUND = {
    "pretrained": (f"hub:{PRETRAINED}@{REVISION}", f"{PRETRAINED}/model.safetensors", MEAN),
    PRETRAINED.removeprefix("timm/"): (f"hub:{PRETRAINED}@{REVISION}", f"{PRETRAINED}/model.safetensors", MEAN),
    "dino": (f"hub:{DINO}@{REVISION}", f"{DINO}/model.safetensors", IMAGENET),
    "hf:owner/bin": (f"hub:owner/bin@{REVISION}", "owner/bin/pytorch_model.bin", MEAN),
    "hf:owner/dino/checkpoints/best.pth": (
        f"hub:owner/dino/checkpoints/best.pth@{REVISION}",
        "owner/dino/checkpoints/best.pth",
        IMAGENET,
    ),
}
NOT_FOUND = {
    "vit_unknown": "timm/vit_unknown could not be fetched from http",
    "hf:owner/unknown": "owner/unknown could not be fetched from http",
    "hf:owner/empty": "owner/empty holds no model.safetensors or pytorch_model.bin; name its file: hf:owner/empty/FILE",
    "hf:owner/bin/other.pth": "owner/bin holds no other.pth",
}
HOSTILE = {
    "hf:owner/elsewhere": "owner/elsewhere/model.safetensors comes without a size, a revision or a usual ETag",
    "hf:owner/huge": "owner/huge/model.safetensors: of 1000000.0 GB",
    "hf:owner/endless": "owner/endless/model.safetensors is longer than it was said to be",
}


def in_a_fresh_process(endpoint: str, folder: Path, *arguments: str, **more: str) -> str:
    """What Python says with these arguments; a process, for huggingface_hub reads its environment once, on import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"} | more
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def test_a_run_keeps_which_weights_of_the_hub_it_took(files: dict[str, bytes], endpoint: str, tmp_path: Path) -> None:
    options = "--dataset digits --weights hf:owner/bin --image_size 8 --train_limit 40 --eval_limit 10 --num_epochs 1"
    program = "from fedtalos.cli import main; main()"
    command = ["-c", program, "centralized", *options.split(), "--run_name", "a", "--device", "cpu"]
    in_a_fresh_process(endpoint, tmp_path, *command)
    made_by = yaml.safe_load((tmp_path / "results/a/config.yaml").read_text())["made_by"]
    sha256 = hashlib.sha256(files["owner/bin/pytorch_model.bin"]).hexdigest()
    source = f"hub:owner/bin@{REVISION}"
    assert made_by["weights"] == {"source": source, "sha256": sha256, "mean": MEAN, "std": STD}
    assert f"owner/bin@{REVISION}: pixels are normalised by mean 0.1, 0.2, 0.3" in made_by["decided"]["weights"]


def test_a_model_of_the_real_timm_is_fetched_masked_and_trained(
    files: dict[str, bytes], endpoint: str, tmp_path: Path
) -> None:
    try:
        timm = pytest.importorskip("timm")
    except RuntimeError as error:  # a torchvision built for another torch
        pytest.skip(f"timm cannot be imported here ({error})")
    theirs = timm.create_model("convnext_atto.d2_in1k").eval()
    files["timm/convnext_atto.d2_in1k/model.safetensors"] = content = save(theirs.state_dict())
    shared = "--dataset digits --weights timm:convnext_atto.d2_in1k --image_size 32 --train_limit 40 --eval_limit 10"
    edit = f"editing {shared} --device cpu --calibration_fraction 0.03 --num_iterations 1 --run_name m"
    train = f"centralized {shared} --device cpu --num_epochs 1 --mask masks/m.safetensors --run_name a"
    program = "import sys; from fedtalos.cli import main; [main(command.split()) for command in sys.argv[1:]]"
    in_a_fresh_process(endpoint, tmp_path, "-c", program, edit, train)
    origin = yaml.safe_load((tmp_path / "results/a/config.yaml").read_text())["made_by"]["weights"]
    source = f"hub:timm/convnext_atto.d2_in1k@{REVISION}"
    assert (origin["source"], origin["sha256"]) == (source, hashlib.sha256(content).hexdigest())
    mask, _ = read_mask_file(tmp_path / "masks/m.safetensors")
    after = load_checkpoint(tmp_path / "checkpoints/a/last.json")
    before = {f"net.{name}": tensor for name, tensor in theirs.state_dict().items() if not name.startswith("head.fc.")}
    moved = {name: after.tensors[name] != tensor for name, tensor in before.items()}
    assert any(entries.any() for entries in moved.values())
    for name, entries in moved.items():
        assert not (entries & ~mask.get(name, torch.zeros_like(entries))).any(), name
    assert not any(".conv_dw." in name for name in mask)
    ours = LibraryModel(LibraryArchitecture(**after.facts["model"]), torch_generator(0, "test"))
    ours.load_state_dict({name: after.tensors[name] for name in ours.state_dict()})
    theirs.load_state_dict({name.removeprefix("net."): after.tensors[name] for name in before}, strict=False)
    images = torch.randn(2, 3, 32, 32, generator=torch_generator(0, "images"))
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.features(images), expected, rtol=0, atol=0)


def test_the_hub_is_asked_once_then_its_cache(files: dict[str, bytes], endpoint: str, tmp_path: Path) -> None:
    def read(*sources: str, **more: str) -> dict[str, Any]:
        """What came of each, or the refusal."""
        said = in_a_fresh_process(endpoint, tmp_path, "-c", READ_IN_A_FRESH_PROCESS, *sources, **more)
        return dict(zip(sources, json.loads(said), strict=True))

    first = read(*FOUND, *NOT_FOUND, *HOSTILE)
    for name, sentence in HOSTILE.items():
        assert sentence in first[name]
    left = {
        path.name for path in tmp_path.rglob("*") if path.name in ("evil", "evil.lock") or ".incomplete" in path.name
    }
    assert left == set()
    for name, (source, file, mean) in FOUND.items():
        assert first[name] == [source, hashlib.sha256(files[file]).hexdigest(), mean]
    for name, sentence in NOT_FOUND.items():
        assert first[name].startswith(f"weights: {sentence}")
    assert first["vit_unknown"].endswith("give weights FILE or none")
    sent = [name for method, name in Hub.asked if method == "GET" and name in files]
    unasked = {"owner/empty/README.md", "owner/elsewhere/model.safetensors", "owner/huge/model.safetensors"}
    assert sorted(sent) == sorted(files.keys() - unasked)
    Hub.asked.clear()
    found = {name: first[name] for name in FOUND}
    assert read(*FOUND) == found  # online
    offline = read(*FOUND, "hf:owner/unknown", HF_HUB_OFFLINE="1")
    assert "(HF_HUB_OFFLINE is set, and it is not in the cache)" in offline.pop("hf:owner/unknown")
    assert offline == found
    assert not Hub.asked
