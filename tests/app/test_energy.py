"""Energy, by stand-ins for what Linux and NVML tell."""

import sys
import types
from pathlib import Path

import pytest
import torch

from fedtalos.app.run.energy import EnergyMeter

CPU = torch.device("cpu")


def counter(powercap: Path, name: str, of: str, microjoules: object, limit: int = 262_143_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    for file, content in (("name", of), ("energy_uj", microjoules), ("max_energy_range_uj", limit)):
        (folder / file).write_text(f"{content}\n")
    return folder / "energy_uj"


def test_joules_are_the_packages_alone_and_go_on_where_a_counter_starts_again(tmp_path: Path) -> None:
    first = counter(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = counter(tmp_path, "intel-rapl:1", "package-1", 262_142_000_000)
    for name, of in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("dtpm", "package-0")):
        counter(tmp_path, name, of, 0).write_text("9000000\n")
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.read() == {"processors": 0.0}
    first.write_text("4000000\n")
    second.write_text("1000000\n")
    assert meter.read() == {"processors": pytest.approx(3 + 2)}
    assert meter.read() == {"processors": pytest.approx(5)}


def test_what_cannot_be_read_is_unknown_and_nothing_is_made_up(tmp_path: Path) -> None:
    assert EnergyMeter(CPU, tmp_path / "nowhere").read() == {}
    counter(tmp_path, "intel-rapl:0", "package-0", "secret")
    assert EnergyMeter(CPU, tmp_path).read() == {}
    there = counter(tmp_path, "intel-rapl:1", "package-1", 5)
    meter = EnergyMeter(CPU, tmp_path)
    there.unlink()
    assert meter.read() == {}


def test_a_card_tells_in_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml, told = types.ModuleType("pynvml"), iter([7000, 7000, 9500])
    nvml.NVMLError = RuntimeError  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(told)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="abc"))
    assert EnergyMeter(torch.device("cuda"), tmp_path).read() == {"card": 2.5}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(torch.device("cuda"), tmp_path).read() == {}
