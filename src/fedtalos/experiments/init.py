"""Write a starter file of options."""

from pathlib import Path

from rich.console import Console

from fedtalos.app.config.files import published
from fedtalos.app.config.help import everyday
from fedtalos.app.config.init import InitConfig, starter
from fedtalos.app.run.display import say
from fedtalos.errors import InputError
from fedtalos.files import write_atomic

DEFAULTS = Path("configs/default_config.yaml")


def run(config: InitConfig, console: Console) -> None:
    """Write the file where none is, and say how to use it."""
    if config.file.exists() or config.file.is_symlink():
        raise InputError(f"{config.file}: is there already, and stays as it is; name another file, or move it away")
    if not config.file.parent.is_dir():
        raise InputError(f"{config.file}: there is no folder {config.file.parent}; make it, or name another file")
    write_atomic(config.file, starter(published(DEFAULTS).read_text(encoding="utf-8"), everyday()))
    say(console, str(config.file))
    say(console, f"change what you need, then: fedtalos federated --config {config.file}")
