"""Small models and images that the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from fedtalos.devices import same_numbers_on_cuda, strict_float32
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_masks
from fedtalos.training.editing.mask_facts import MaskFacts

# No test looks at the clock: on a busy machine anything may take long.
hypothesis.settings.register_profile(
    "without a clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("without a clock")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small tensors: threads cost more than they give


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """Tests keep decoded images apart from the user's."""
    os.environ["FEDTALOS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch) -> Path:
    """The working directory, empty at the start of each test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_figures(monkeypatch) -> None:
    """Commands draw no figures, which take them a second a run."""
    from fedtalos.app.figures import draw as plots  # imports everything
    from fedtalos.app.report import page

    for figure in ("plot_run", "plot_masks", "plot_iterations"):
        monkeypatch.setattr(plots, figure, lambda *_: [])
    monkeypatch.setattr(page, "write_report", lambda path, _: path)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with a finished run, masks, and every kind of broken file; to be read only."""
    from material import make  # imports everything

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("material")
    make(folder)
    return folder


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Steps are recorded on a CPU where CUDA would capture them; the list has an entry for each."""
    from recorded import Recorded

    from fedtalos.training.engine import capture

    made: list[int] = []
    monkeypatch.setattr(capture, "DEVICES_WITH_GRAPHS", ("cpu", "cuda"))
    monkeypatch.setattr(capture, "CapturedStep", lambda *given: made.append(1) or Recorded(*given))
    return made


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUMERIC = ("training", "federated", "editing", "models")
"""Folders whose tests of numbers run on every device that is there."""


@pytest.fixture(autouse=True)
def cpu_but_for_numbers(request, monkeypatch) -> None:
    """Commands and whatever else asks for no ``device`` see no CUDA: what they print and count is then the same."""
    if "device" not in request.fixturenames and len(DEVICES) > 1:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that it starts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for ``device``, by itself or through ``vit``, once for each of them."""
    if "device" in metafunc.fixturenames and len(DEVICES) > 1 and metafunc.definition.path.parent.name in NUMERIC:
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def device(request) -> Iterator[torch.device]:
    """The CPU; with CUDA also CUDA, in strict float32 and adding in one order."""
    device = torch.device(getattr(request, "param", "cpu"))
    if device.type == "cpu":
        yield device
        return
    same_numbers_on_cuda()
    with strict_float32():
        yield device
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def vit(device) -> VisionTransformer:
    """A micro ViT on 8 px images, 17 tokens, 5 classes."""
    return VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test")).to(device)


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch_generator(0, "images")).to(device)


@pytest.fixture
def labels(device) -> torch.Tensor:
    return torch.arange(12, device=device) % 5


def mask_header(mask, model) -> MaskFacts:
    """A header that fits a mask; what else it says is made up."""
    return MaskFacts(
        version="0",
        criterion="random",
        fisher="none",
        fisher_samples=0,
        iterations=1,
        granularity="entry",
        eligible_in="blocks",
        eligible=sum(int(t.sum()) for t in eligible_masks({n: t.shape for n, t in mask.items()}, "blocks").values()),
        active=sum(int(tensor.sum()) for tensor in mask.values()),
        target_density=0.5,
        soft_zero=0.01,
        calibration="central",
        clients=0,
        calibration_images=0,
        seed=0,
        model=model,
        weights="none",
        data="none",
        head="none",
    )
