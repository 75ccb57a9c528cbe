"""A trained model and its card put on the Hugging Face hub."""

import re

from rich.console import Console

from fedtalos.app.config.after_training import PushConfig
from fedtalos.app.model_card import check_license, model_card
from fedtalos.app.run.display import say
from fedtalos.app.trained import open_trained
from fedtalos.errors import InputError
from fedtalos.models.export.folder import files_of


def run(config: PushConfig, console: Console) -> None:
    """Export to memory, then push all files in one commit, so that the repository has all of them or none."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.hub) is None:
        raise InputError(f"--hub {config.hub}: expected OWNER/REPO")
    check_license(config.license)
    trained = open_trained(config.run, config.output_dir, config.which)
    card = model_card(trained, config.format, config.license, repo=config.hub)
    files = {**files_of(trained.model, trained.classes, config.format), "README.md": card.encode(errors="replace")}
    say(console, push(files, config.hub, f"{trained.name} ({config.format})", private=config.private))


def push(files: dict[str, bytes], repo: str, message: str, *, private: bool) -> str:
    """Put files into a model repository, made where it is not there; returns the commit's address.

    Raises InputError where the hub cannot be reached, or does not let this account write there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise InputError(f"push: no account of {constants.ENDPOINT} is set up; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        said = error.server_message or str(error).strip().partition("\n")[0]
        raise InputError(
            f"push: {constants.ENDPOINT} refused {repo} ({status}: {said}); check its name, and that your token may "
            "write there"
        ) from error
    except Exception as error:  # httpx's and the hub's own errors share no narrower base
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"push: {repo} could not be pushed to {constants.ENDPOINT} ({said}); mend that, and try again"
        ) from error
    return str(commit.commit_url)
