"""push against a local server that plays the Hugging Face hub: create, preupload, large files, one commit."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from commands import refused
from huggingface_hub import constants

from fedtalos.checkpoint import save_checkpoint
from fedtalos.cli import main
from fedtalos.models.weights.read import load_weights


@pytest.fixture(autouse=True)
def trained(in_a_folder_of_its_own, vit) -> None:
    """The checkpoint of a run `a`, without the run's records."""
    facts = {"model": vit.architecture.as_dict(), "classes": list("abcde"), "mean": vit.mean, "std": vit.std}
    facts |= {"command": "federated", "options": {"dataset": "cifar10", "num_clients": 3}}
    save_checkpoint(Path("checkpoints/a"), "last", 1, dict(vit.state_dict()), facts)


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of a push; safetensors and .pt files are large ones, everything else comes in the commit itself."""

    repos: ClassVar[list[dict[str, Any]]] = []
    large: ClassVar[dict[str, bytes]] = {}
    commits: ClassVar[list[list[dict[str, Any]]]] = []
    tokens: ClassVar[set[str]] = set()
    refuses: ClassVar[str] = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers.get("Authorization", ""))
        here = f"http://{self.headers['Host']}"
        if self.refuses and self.refuses in self.path:
            return self.answer({"error": "You may not write here"}, 403)
        if self.path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return self.answer({"url": f"{here}/me/vit"})
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            large = {path: modes[path.endswith((".safetensors", ".pt"))] for path in paths}
            return self.answer({"files": [{"path": p, "uploadMode": large[p], "shouldIgnore": False} for p in paths]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{here}/put/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert "/commit/main" in self.path, self.path
        self.commits.append([json.loads(line) for line in body.splitlines()])
        return self.answer({"commitUrl": f"{here}/me/vit/commit/1", "commitOid": "1", "pullRequestUrl": None})

    def do_PUT(self) -> None:
        self.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    for name in ("repos", "large", "commits", "tokens"):
        monkeypatch.setattr(Hub, name, type(getattr(Hub, name))())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's own protocol of chunks has no stand-in
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.filterwarnings("ignore")  # of sockets that the client leaves to the garbage collector
def test_push_puts_every_file_into_one_commit(hub, capsys):
    main(["push", "a", "--hub", "me/vit", "--private", "--license", "mit"])
    assert capsys.readouterr().out.endswith("/me/vit/commit/1\n")
    assert hub.repos == [{"name": "vit", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {"Bearer hf_mine"}
    (commit,) = hub.commits
    assert commit[0]["value"]["summary"] == "a (hf)"
    small = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in commit if one["key"] == "file"}
    assert sorted(small) == ["README.md", "config.json", "preprocessor_config.json"]
    (file,) = (one["value"] for one in commit if one["key"] == "lfsFile")
    Path("model.safetensors").write_bytes(hub.large[file["oid"]])
    for name, content in small.items():
        Path(name).write_bytes(content)
    assert load_weights("model.safetensors", "micro").architecture.num_classes == 5
    card = Path("README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert (about["license"], about["datasets"]) == ("mit", ["uoft-cs/cifar10"])
    assert "federated-learning" in about["tags"]
    assert 'model="me/vit"' in card

    hub.refuses = "/api/repos/create"
    assert "refused me/vit (403: You may not write here)" in refused(["push", "a", "--hub", "me/vit"], capsys)
    hub.refuses = ""
    constants.ENDPOINT = "http://127.0.0.1:9"
    assert "me/vit could not be pushed to http://127.0.0.1:9" in refused(["push", "a", "--hub", "me/vit"], capsys)
    assert len(hub.commits) == 1


def test_push_needs_an_account(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "run `hf auth login`, or set HF_TOKEN" in refused(["push", "a", "--hub", "me/vit"], capsys)
