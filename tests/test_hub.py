"""The hub as read_weights sees it, played by a local server."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from safetensors.torch import save

from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator

REVISION = "0123456789abcdef0123456789abcdef01234567"
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
PRETRAINED = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two requests of a download, OWNER/REPO/resolve/main or REVISION/FILE."""

    files: ClassVar[dict[str, bytes]] = {}
    """By OWNER/REPO/FILE."""

    def do_HEAD(self) -> None:
        owner, repo, _, _, file = self.path.removeprefix("/").split("/", 4)
        content = self.files.get(f"{owner}/{repo}/{file}")
        self.send_response(404 if content is None else 200)
        if content is None:
            known = any(name.startswith(f"{owner}/{repo}/") for name in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.content = content or b""

    def do_GET(self) -> None:
        self.do_HEAD()
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
        "owner/bin/pytorch_model.bin": saved.getvalue(),
        "owner/bin/preprocessor_config.json": json.dumps({"image_mean": MEAN, "image_std": STD}).encode(),
        "owner/dino/checkpoints/best.pth": saved.getvalue(),
        "owner/empty/README.md": b"",
    }
    monkeypatch.setattr(Hub, "files", files)
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
from fedtalos.models.pretrained import read_weights
said = []
for source in sys.argv[1:]:
    try:
        weights = read_weights(source, "tiny")
        said.append([weights.source, weights.sha256, weights.mean, weights.std])
    except InputError as refusal:
        said.append(str(refusal))
json.dump(said, sys.stdout)
"""

FOUND = {
    "pretrained": (f"hub:{PRETRAINED}@{REVISION}", f"{PRETRAINED}/model.safetensors", MEAN),
    PRETRAINED.removeprefix("timm/"): (f"hub:{PRETRAINED}@{REVISION}", f"{PRETRAINED}/model.safetensors", MEAN),
    "hf:owner/bin": (f"hub:owner/bin@{REVISION}", "owner/bin/pytorch_model.bin", MEAN),
    "hf:owner/dino/checkpoints/best.pth": (
        f"hub:owner/dino/checkpoints/best.pth@{REVISION}",
        "owner/dino/checkpoints/best.pth",
        [0.485, 0.456, 0.406],  # ImageNet's, for the name says dino and no JSON file says otherwise
    ),
}
NOT_FOUND = {
    "vit_unknown": "timm/vit_unknown could not be fetched from http",
    "hf:owner/unknown": "owner/unknown could not be fetched from http",
    "hf:owner/empty": "owner/empty holds no model.safetensors or pytorch_model.bin; name its file: hf:owner/empty/FILE",
    "hf:owner/bin/other.pth": "owner/bin holds no other.pth",
}


def in_a_fresh_process(endpoint: str, folder: Path, *arguments: str, **more: str) -> str:
    """What Python says with these arguments; a process, for huggingface_hub reads its environment once, on import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"} | more
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, timeout=60, text=True)
    return done.stdout


def test_a_run_keeps_which_weights_of_the_hub_it_took(files: dict[str, bytes], endpoint: str, tmp_path: Path) -> None:
    options = "--dataset digits --weights hf:owner/bin --image_size 8 --train_limit 40 --eval_limit 10 --num_epochs 1"
    program = "from fedtalos.cli import main; main()"
    command = ["-c", program, "centralized", *options.split(), "--run_name", "a", "--device", "cpu"]
    in_a_fresh_process(endpoint, tmp_path, *command)
    made_by = yaml.safe_load((tmp_path / "results/a/config.yaml").read_text())["made_by"]
    sha256 = hashlib.sha256(files["owner/bin/pytorch_model.bin"]).hexdigest()
    assert made_by["weights"] == {"source": f"hub:owner/bin@{REVISION}", "sha256": sha256}


def test_the_hub_is_asked_once_then_its_cache(files: dict[str, bytes], endpoint: str, tmp_path: Path) -> None:
    def read(**more: str) -> tuple[list[object], dict[str, str]]:
        asked = ("-c", READ_IN_A_FRESH_PROCESS, *FOUND, *NOT_FOUND)
        said = json.loads(in_a_fresh_process(endpoint, tmp_path, *asked, **more))
        return said[: len(FOUND)], dict(zip(NOT_FOUND, said[len(FOUND) :], strict=True))

    fetched, refused = read()
    for (source, file, mean), (said, sha256, said_mean, _) in zip(FOUND.values(), fetched, strict=True):
        assert (said, sha256, said_mean) == (source, hashlib.sha256(files[file]).hexdigest(), mean)
    for name, sentence in refused.items():
        assert sentence.startswith(f"--weights: {NOT_FOUND[name]}")
    assert refused["vit_unknown"].endswith("give --weights FILE or none")
    Hub.files.clear()
    assert read()[0] == fetched  # online, of a hub that has nothing any more
    cached, refused = read(HF_HUB_OFFLINE="1")
    assert cached == fetched
    assert "(HF_HUB_OFFLINE is set, and it is not in the cache)" in refused["hf:owner/unknown"]
