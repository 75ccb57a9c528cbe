"""benchmarks/gpu.py is for machines that have only torch, numpy, annotated-types (pure Python) and this source."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}
RUN = """
import runpy, sys
sys.modules |= dict.fromkeys({absent!r})
sys.argv = ["gpu.py", "--smoke", "--at_once", "2", "--precisions", "bf16"]
runpy.run_path("gpu.py", run_name="__main__")
"""


def test_it_measures_everything_with_torch_and_numpy_only():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [requirement.split(">")[0] for requirement in stated]
    absent = [IMPORTED_AS.get(name, name) for name in names if name not in ("torch", "numpy", "annotated-types")]
    assert "pydantic" in absent
    script = RUN.format(absent=absent)
    path = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "benchmarks", env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| bf16 |")]
    assert [line.split(" | ")[1:3] for line in table] == [
        [moves, way]
        for moves in ("all", "90 % q/k")
        for way in (
            *("one by one", "2 together", "1 together, graph", "2 together, graph"),
            *("bare eager step", "prototype, 2 compiled, graph"),
        )
    ]
    assert "Fisher scores:" in done.stdout


def test_a_step_on_a_card_says_what_it_lacks_and_ends_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from on_a_card import Step

    assert Step("a", [], 1, ["no-such-package"]).run(tmp_path, 60) == "left out: this Python lacks no-such-package"
    assert Step("b", ["-c", "import time; time.sleep(600)"], 10).run(tmp_path, 1.5).startswith("stopped")
    assert Step("c", ["-c", "raise SystemExit(3)"], 10).run(tmp_path, 60).startswith("ended with code 3")
