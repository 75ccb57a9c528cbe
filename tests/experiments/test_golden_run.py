"""One cell of a shipped grid, from pretraining to the test split, against the figures that it had."""

import csv
import io
from pathlib import Path

import pytest

from fedtalos.cli import main

CELL = "digits-nc2-mask-s0"
GOLDEN = Path(__file__).parents[1] / "golden" / f"{CELL}.csv"
"""results/CELL/metrics.csv of `fedtalos sweep digits --only CELL --threads 1`, without its last column, the seconds."""


@pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")
def test_a_cell_of_the_grid_digits_has_its_golden_metrics():
    main(["sweep", "digits", "--only", CELL, "--threads", "1", "--device", "cpu"])
    found, expected = read(Path("results", CELL, "metrics.csv").read_text()), read(GOLDEN.read_text())
    assert [row["split"] for row in found] == [row["split"] for row in expected]
    for ours, golden in zip(found, expected, strict=True):
        for exact in ("round", "examples", "learning_rate", "bytes_down", "bytes_up"):
            assert ours[exact] == golden[exact], (exact, golden)
        # Sums come in another order on another processor, and training carries that on.
        assert float(ours["loss"]) == pytest.approx(float(golden["loss"]), rel=0.05), golden
        assert float(ours["accuracy"]) == pytest.approx(float(golden["accuracy"]), abs=0.03), golden


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))
