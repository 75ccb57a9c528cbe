"""Shell completion: a script by tyro's own flag, which knows every command and its options."""

import shutil
import subprocess
from pathlib import Path

import pytest
from commands import refused

from fedtalos.cli import COMMANDS, main

TRY = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_tyro_fedtalos
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "fedtalos.bash"
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-write-completion", "bash", str(path)])
    assert not stop.value.code
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fe", "federated"),
        ("stat", "status"),
        ("federated --num_c", "--num_clients"),
        ("federated --partition d", "dirichlet"),
        ("mask comp", "compare"),
        ("runs --foll", "--follow"),
    ],
)
def test_bash_completes(script, words, found):
    program = TRY.format(script=script, words=f"fedtalos {words}")
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


def test_every_command_is_in_it(script):
    text = script.read_text()
    assert all(name in text for name in COMMANDS)


def test_what_it_cannot_do_is_said(capsys):
    assert "expected a shell (bash, zsh, tcsh, fish), got powershell" in refused(
        ["--tyro-print-completion", "powershell"], capsys
    )
    assert "expected a file" in refused(["--tyro_write_completion", "zsh"], capsys)
