"""Flower's programs as children of this process: started with what they need, and ended with it, whatever happens."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from fedtalos.app.run.interruption import safe_point
from fedtalos.errors import InputError
from fedtalos.files import write_atomic
from fedtalos.fleet.programs import PARENT

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
}
"""Flower reports to nobody, installs nothing, and looks for work every 50 ms."""
PATIENCE = 10.0
"""Seconds that a program is given to end by itself."""


def require_flower() -> None:
    """InputError, with the command that installs it, where Flower is not here."""
    if find_spec("flwr") is None or find_spec("cryptography") is None:
        raise InputError(
            "fleet: needs Flower, in an environment of its own: "
            "in the checkout: pip install -c fleet-constraints.txt -e '.[fleet]' (docs/fleet.md)"
        )


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of Flower's programs: quiet, at home in a folder, and with our programs in place of two of theirs.

    Flower starts flwr-clientapp and flwr-serverapp by their bare names; those on the path run what is installed here.
    """
    shims = home.resolve() / "bin"
    ours = {"clientapp": program("clientapp"), "serverapp": [sys.executable, "-m", "fedtalos.fleet.lead"]}
    for name, words in ours.items():
        path = shims / f"flwr-{name}"
        write_atomic(path, f'#!/bin/sh\nexport {PARENT}=$PPID\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)
    places = [str(shims), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    known = {**os.environ, **QUIET, "FLWR_HOME": str(home.resolve()), "PATH": os.pathsep.join(places)}
    return {**known, **(more or {})}


def by_hand(words: Sequence[str]) -> str:
    """Write a program's words as a person would type them: Flower's own program, without ours around it."""
    *_, name = [word for word in words[:4] if word in ("superlink", "supernode")] or [""]
    plain = [f"flower-{name}", *words[words.index(name) + 1 :]] if name else list(words)
    return shlex.join(plain)


def program(name: str, *words: str | Path) -> list[str]:
    """Words that start one of our programs around Flower's."""
    return [sys.executable, "-m", "fedtalos.fleet.programs", name, *map(str, words)]


def flower(*words: str | Path) -> list[str]:
    """Words that start Flower's own command."""
    path = shutil.which("flwr", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise InputError("fleet: the command flwr is not on the path; install the extra fleet anew")
    return [path, *map(str, words)]


class Child:
    """A program that runs beside this one, in a group of its own, and is ended when the block is left.

    What it starts itself is ended with it: asked first, and killed where it does not end.

    >>> with Child(program("superlink", "--insecure"), environment(home), log=Path("server.log")) as server:
    ...     server.wait()
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        self.words, self.log = list(words), log
        self._environment = dict(environment)

    def __enter__(self) -> Self:
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        self._out = None if self.log is None else self.log.open("ab")
        self.process = subprocess.Popen(
            self.words,
            env={**self._environment, PARENT: str(os.getpid())},
            stdout=self._out,
            stderr=None if self._out is None else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
        if self._out is not None:
            self._out.close()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        """Wait until the program ends by itself; returns its status."""
        while self.running:
            safe_point()
            time.sleep(0.2)
        return self.process.returncode

    def end(self) -> None:
        """Ask the program and all that it started to end, and kill what is left after a while."""
        group, until = self.process.pid, time.monotonic() + PATIENCE
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not _signal(group, number):
                break
            while time.monotonic() < until and _signal(group, 0):
                self.process.poll()  # takes leave of it, so that the group can be empty
                time.sleep(0.05)
            until = time.monotonic() + PATIENCE
        self.process.wait()

    def tail(self, lines: int = 5) -> str:
        """The last lines that the program wrote."""
        if self.log is None or not self.log.is_file():
            return ""
        return " / ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _signal(group: int, number: int) -> bool:
    """Signal a group of processes; False where there is none any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
