"""Small models and images that the tests share."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.mask_file import MaskFacts

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

    for figure in ("plot_run", "plot_masks", "plot_iterations"):
        monkeypatch.setattr(plots, figure, lambda *_: [])


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with a finished run, masks, and every kind of broken file; to be read only."""
    from material import make  # imports everything

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("material")
    make(folder)
    return folder


@pytest.fixture
def vit() -> VisionTransformer:
    """A micro ViT on 8 px images, 17 tokens, 5 classes."""
    return VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch_generator(0, "images"))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(12) % 5


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
        eligible=sum(tensor.numel() for tensor in mask.values()),
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
