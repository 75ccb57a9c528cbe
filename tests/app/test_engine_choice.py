"""How steps run follows from sizes: what --compile and --clients_at_once come to."""

import pytest
import torch

from fedtalos.app import engine
from fedtalos.app.config.apart import ApartOptions
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, FederatedConfig, FederationOptions, RunOptions
from fedtalos.app.engine import (
    BYTES_OF_ACTIVATIONS,
    BYTES_OF_STATE,
    SHARE_OF_MEMORY,
    WORK_THAT_PAYS,
    clients_at_once,
    images_of,
    way_of,
    way_of_scores,
    work_an_image,
)
from fedtalos.devices import distinct_places, same_numbers_on_cuda
from fedtalos.models.backbone import Backbone
from fedtalos.notes import noted
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask


@pytest.fixture
def numbers_as_they_were():
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = True


class Foreign(Backbone):
    architecture = "timm:net"
    stages = ()

    def frozen_stages(self, moving):
        return 0


@pytest.mark.parametrize(
    ("asked", "kind", "work", "way"),
    [
        ("auto", "cpu", 9e99, "off"),
        ("auto", "mps", 9e99, "off"),
        ("auto", "cuda", WORK_THAT_PAYS - 1, "graph"),
        ("auto", "cuda", WORK_THAT_PAYS, "on"),
        ("on", "cpu", 0, "on"),
        ("on", "cuda", 0, "on"),
        ("graph", "cuda", 9e99, "graph"),
        ("graph", "cpu", 0, "off"),
        ("off", "cuda", 9e99, "off"),
    ],
)
def test_the_way_follows_from_device_and_work(vit, asked, kind, work, way):
    noted()
    assert way_of(asked, vit, kind, work) == way
    assert bool(noted()) == ((asked, kind) == ("graph", "cpu"))


@pytest.mark.parametrize(
    ("asked", "device", "said"), [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True)]
)
def test_models_of_other_libraries_run_as_they_stand_and_that_is_said(asked, device, said, numbers_as_they_were):
    noted()
    assert way_of(asked, Foreign(), device, 9e99) == "off"
    assert ("timm:net is not ours" in noted().get("engine", "")) == said
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (device == "cuda")


def test_scores_are_never_compiled(vit):
    ways = {
        asked: way_of_scores(EditingConfig(run=RunOptions(compile=asked)), vit, "cuda")
        for asked in ("auto", "on", "off")
    }
    assert ways == {"auto": "graph", "on": "graph", "off": "off"}


@pytest.mark.parametrize(
    ("room", "workers", "apart", "size"),
    [
        *((10, 1, {}, 10), (99, 1, {}, 10), (9, 1, {}, 5), (3, 1, {}, 3), (0, 1, {}, 1), (9, 3, {}, 4)),
        *((999, 1, {"one_shot": True}, 100), (30, 1, {"one_shot": True, "tasks": 5, "leave_out": (1,)}, 27)),
    ],
)
def test_a_stack_is_a_round_s_clients_as_far_as_memory_goes(vit, room, workers, apart, size, monkeypatch):
    """Memory has room for so many clients of a round of ten, and a half."""
    moving = MaskedParameters(vit, head_mask(vit))
    local = LocalTraining(augmentation="crop_flip", precision="bf16")
    client = 64 * 17 * 96 * 6 * BYTES_OF_ACTIVATIONS["bf16"] + BYTES_OF_STATE * len(moving)
    monkeypatch.setattr(MaskedParameters, "device", torch.device("cuda"))
    monkeypatch.setattr(engine, "total_memory", lambda _: (room + 0.5) * client / SHARE_OF_MEMORY)
    config = FederatedConfig(federation=FederationOptions(workers=workers), apart=ApartOptions(**apart))
    assert clients_at_once(config, moving, local) == size


def test_work_is_what_a_run_has_to_do(vit):
    assert work_an_image(vit, 0) == 17 * 96 * 6
    assert work_an_image(vit, 3) == 17 * 96 * 4  # behind two blocks
    assert images_of(CentralizedConfig(num_epochs=3), 500, LocalTraining()) == 1500
    assert images_of(FederatedConfig(), 50_000, LocalTraining(steps=4)) == 100 * 10 * 4 * 64


def test_cuda_adds_in_one_order_but_where_places_differ(numbers_as_they_were, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    same_numbers_on_cuda()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with distinct_places():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()
