"""Texts of the files that ``fleet init`` writes: the app, and the page of instructions."""

PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtalos-fleet"
version = "1.0.0"
description = "Federated rounds of fedtalos over Flower"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedtalos"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
run-name = ""
editing = false
resume = false
output-dir = "."
deadline = 600.0
patience = 120.0
min-nodes = 1
wire = "float32"
"""
SERVER_APP = '''"""The server's side of a run."""

from pathlib import Path

from fedtalos.fleet.lead import server_app

app = server_app(Path(__file__).parent)
'''
CLIENT_APP = '''"""A node's side of a run."""

from fedtalos.fleet.app import client_app as app

__all__ = ["app"]
'''
README = """# A fleet of {clients} nodes

The server is {host}:{port}. On its machine, where `fedtalos fleet init` was called, each in a terminal of its own:

    fedtalos fleet server {folder}
    fedtalos fleet run {folder}

The machine of each node K, from 0 to {last}, needs {files}, in a folder `{name}`. Beside that folder:

    fedtalos fleet node {name} --client K --dataset {dataset} --data_dir FOLDER

{safety}
What the nodes send, and what this keeps from whom, is in docs/fleet.md.
"""
WITH_TLS = {
    "files": "`fleet.yaml`, `certificates/ca.crt` and `keys/client_K`",
    "safety": "Keep `certificates/server.key` on the server's machine, and each `keys/client_K` on its node's.\n"
    "Whoever has a node's key can be that node.",
}
WITHOUT_TLS = {
    "files": "`fleet.yaml`",
    "safety": "Nothing is encrypted, and whoever reaches the server can be a node.",
}
