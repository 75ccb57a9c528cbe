"""Statistics of pixels and resizing: stated beside the weights, or seen by their kind; the same for the same bytes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from fedtalos.app.load import load
from fedtalos.cli import main, parse
from fedtalos.errors import InputError
from fedtalos.models.load import model_with_weights
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.pixels import HALF, IMAGENET
from fedtalos.models.weights.read import load_weights
from fedtalos.notes import noted
from fedtalos.randomness import torch_generator
from fedtalos.training.feature_cache import view_of

State = dict[str, Tensor]
OWN = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
CLASSES = tuple("abcdefghij")
PREPROCESSOR = {"image_mean": OWN[0], "image_std": OWN[1], "do_normalize": True, "size": {"height": 16, "width": 16}}
TIMM = {"architecture": "vit_micro", "num_features": 96, "pretrained_cfg": {"mean": OWN[0], "std": OWN[1]}}


@pytest.fixture
def state() -> State:
    noted()
    return VisionTransformer(Architecture("micro", 16, 4, 10), torch_generator(0, "theirs")).state_dict()


def said_and_read(path: Path, state: State, **beside: object) -> tuple[str, Any]:
    """Statistics that a file gets, and the note about it; ``beside`` are JSON files by stem."""
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    for stem, content in beside.items():
        path.with_name(f"{stem}.json").write_text(json.dumps(content))
    weights = load_weights(path, "micro")
    return noted()["weights"], (weights.mean, weights.std)


@pytest.mark.parametrize("name", ["model.safetensors", "vit.pth", "my_dino.bin", "mae.pth.tar", "deit.ckpt", "x"])
@pytest.mark.parametrize("beside", [{"preprocessor_config": PREPROCESSOR}, {"config": TIMM}])
def test_the_folders_files_beat_any_name(tmp_path: Path, state: State, name: str, beside: dict[str, object]) -> None:
    said, found = said_and_read(tmp_path / name, state, **beside)
    assert found == OWN
    assert f"by {tmp_path / next(iter(beside))}.json" in said


def test_statements_are_trusted_in_order(tmp_path: Path, state: State) -> None:
    """A file of the same stem, the file's own metadata, the preprocessor's file, the model's."""
    path = tmp_path / "vit.safetensors"

    def plain(value: float) -> dict[str, list[float]]:
        return {"mean": [value] * 3, "std": [value] * 3}

    save_file(state, path, {"pixels": json.dumps(plain(0.2))})
    files = {"vit": 0.1, "preprocessor_config": 0.3, "config": 0.4}
    for name, value in files.items():
        path.with_name(f"{name}.json").write_text(json.dumps(plain(value)))
    found = []
    for drop in ("vit.json", None, "preprocessor_config.json", "config.json"):
        found.append(load_weights(path, "micro").mean[0])
        if drop is None:
            save_file(state, path)
        else:
            path.with_name(drop).unlink()
    assert found == [0.1, 0.2, 0.3, 0.4]
    assert load_weights(path, "micro", normalisation="imagenet").mean == IMAGENET[0]


@pytest.mark.parametrize("ending", [".pth.tar", ".ckpt", ".safetensors"])
def test_a_json_of_the_same_stem_is_found_whatever_the_ending(tmp_path: Path, state: State, ending: str) -> None:
    assert said_and_read(tmp_path / f"vit.s{ending}", state, **{"vit.s": {"mean": OWN[0], "std": OWN[1]}})[1] == OWN


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_processor": {"image_mean": OWN[0], "image_std": OWN[1]}}, OWN),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3}, HALF),
        ({"do_normalize": False, "image_mean": OWN[0], "image_std": OWN[1]}, ((0.0,) * 3, (1.0,) * 3)),
        ({"do_rescale": True, "size": 224}, HALF),
        ({"\ufeffx": 1}, HALF),
    ],
)
def test_layouts_of_preprocessor_files(tmp_path: Path, state: State, config: object, expected: object) -> None:
    assert said_and_read(tmp_path / "model.safetensors", state, preprocessor_config=config)[1] == expected


def test_the_config_of_another_model_is_passed_over_and_said(tmp_path: Path, state: State) -> None:
    beside = {"config": {"model_type": "vit", "hidden_size": 768}, "preprocessor_config": PREPROCESSOR}
    said, found = said_and_read(tmp_path / "micro.safetensors", state, **beside)
    assert found == HALF
    assert "config.json beside it is of another model (width 768)" in said


@pytest.mark.parametrize("name", ["preprocessor_config", "config"])
@pytest.mark.parametrize("content", ["{", "[]", '{"image_mean": [0.5]}', '{"pretrained_cfg": {"mean": "x"}}'])
def test_a_broken_file_beside_is_refused_and_can_be_overridden(
    tmp_path: Path, state: State, name: str, content: str
) -> None:
    path = tmp_path / "vit.safetensors"
    save_file(state, path)
    path.with_name(f"{name}.json").write_text(content)
    with pytest.raises(InputError, match=rf"{name}\.json: expected .* normalisation imagenet or half"):
        load_weights(path, "micro")
    assert load_weights(path, "micro", normalisation="half").mean == HALF[0]


def zeroed(state: State) -> State:
    fixed = state["pos_embed"].clone()
    fixed[:, 0] = 0
    return state | {"pos_embed": fixed}


@pytest.mark.parametrize(
    ("wrap", "expected", "why"),
    [
        (lambda s: {"teacher": s, "student": {"dino_head.last_layer.weight": torch.ones(2)}}, IMAGENET, "a DINO head"),
        (lambda s: {"model": s | {"decoder_embed.weight": torch.ones(2, 2)}}, IMAGENET, "MAE's decoder"),
        (lambda s: {f"module.base_encoder.{name}": tensor for name, tensor in s.items()}, IMAGENET, "MoCo's encoders"),
        (
            lambda s: s | {f"blocks.{n}.ls{k}.gamma": torch.ones(96) for n in range(6) for k in (1, 2)},
            IMAGENET,
            "layer",
        ),
        (
            lambda s: s | {f"blocks.{n}.gamma_{k}": torch.ones(96) for n in range(6) for k in (1, 2)},
            IMAGENET,
            "DeiT III",
        ),
        (lambda s: s | {"register_tokens": torch.ones(1, 2, 96)}, IMAGENET, "register tokens"),
        (zeroed, IMAGENET, "a fixed position embedding"),
        (lambda s: s | {"head.weight": torch.ones(21843, 96), "head.bias": torch.ones(21843)}, HALF, "21843 classes"),
        (lambda s: s, HALF, "a guess, since nothing in or beside the file says which"),
    ],
)
@pytest.mark.parametrize("name", ["vit.pth", "weights.ckpt"])
def test_the_kind_of_the_weights_is_seen_by_what_is_in_them(
    tmp_path: Path, state: State, name: str, wrap: Any, expected: object, why: str
) -> None:
    said, found = said_and_read(tmp_path / name, wrap(state))
    assert found == expected
    assert why in said
    assert "normalisation imagenet or half overrides that" in said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_small_patch16_224.fb_in1k", IMAGENET),
        ("mae_pretrain_vit_base", IMAGENET),
        ("mocov3-vit-b-300ep", IMAGENET),
        ("dinov2_vits14", IMAGENET),
        ("ibot_vits", IMAGENET),
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", HALF),
        ("maeve", HALF),
        ("vit", HALF),
    ],
)
def test_the_name_decides_at_last_and_is_said_to(tmp_path: Path, state: State, name: str, expected: object) -> None:
    said, found = said_and_read(tmp_path / f"{name}.pth", state)
    assert found == expected
    assert f"the name {name}.pth alone" in said or expected == HALF


def test_what_the_config_beside_calls_the_model_beats_the_files_name(tmp_path: Path, state: State) -> None:
    said, found = said_and_read(tmp_path / "augreg.pth", state, config={"model_type": "vit_mae", "hidden_size": 96})
    assert found == IMAGENET
    assert "model_type vit_mae in" in said


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        (
            {
                "config": TIMM
                | {"pretrained_cfg": TIMM["pretrained_cfg"] | {"interpolation": "bicubic", "crop_pct": 0.9}}
            },
            0.9,
        ),
        ({"preprocessor_config": PREPROCESSOR | {"resample": 3, "crop_pct": 0.875}}, 0.875),
        (
            {
                "preprocessor_config": PREPROCESSOR
                | {"resample": 3, "do_center_crop": True, "size": {"shortest_edge": 20}, "crop_size": {"height": 16}}
            },
            0.8,
        ),
        (
            {
                "preprocessor_config": PREPROCESSOR
                | {"resample": 3, "do_center_crop": True, "size": 16, "crop_size": 32}
            },
            1,
        ),
        ({"preprocessor_config": PREPROCESSOR | {"resample": 3, "crop_pct": "most"}}, 1),
    ],
)
def test_resizing_is_read_and_followed_unless_plain_is_asked_for(
    tmp_path: Path, state: State, beside: dict[str, object], expected: float
) -> None:
    said_and_read(tmp_path / "model.safetensors", state, **beside)
    weights = load_weights(tmp_path / "model.safetensors", "micro")
    assert (weights.interpolation, weights.crop) == ("bicubic", expected)
    plain = model_with_weights(weights, CLASSES, resize="plain")
    assert (plain.interpolation, plain.crop) == ("bilinear", 1.0)
    assert "the weights' makers: bicubic" in noted()["resize"]
    theirs = model_with_weights(weights, CLASSES)
    assert (theirs.interpolation, theirs.crop) == ("bicubic", expected)
    assert noted()["resize"].startswith("images are resized bicubic")


def test_resizing_is_bilinear_and_whole_where_nothing_states_it(tmp_path: Path, state: State) -> None:
    said_and_read(tmp_path / "model.safetensors", state, preprocessor_config=PREPROCESSOR | {"resample": 2})
    weights = load_weights(tmp_path / "model.safetensors", "micro")
    model = model_with_weights(weights, CLASSES)
    assert (model.interpolation, model.crop) == ("bilinear", 1.0)
    assert "resize" not in noted()


def test_a_run_records_the_weights_way_and_its_checkpoint_keeps_it(
    in_a_folder_of_its_own, without_figures, state: State
) -> None:
    save_file(state, "vit.safetensors")
    own = PREPROCESSOR | {"resample": 3, "crop_pct": 0.8}
    Path("vit.json").write_text(json.dumps(own))
    shared = "--dataset digits --device cpu --train_limit 40 --eval_limit 10"
    run = f"centralized {shared} --weights vit.safetensors --image_size 16 --num_epochs 1"
    main(shlex.split(f"{run} --resize plain --run_name plain"))
    main(shlex.split(f"{run} --run_name theirs"))
    plain, theirs = (
        yaml.safe_load(Path(f"results/{name}/config.yaml").read_text())["made_by"] for name in ("plain", "theirs")
    )
    assert (theirs["weights"]["interpolation"], theirs["weights"]["crop"]) == ("bicubic", 0.8)
    assert theirs["weights"]["mean"] == list(OWN[0])
    assert "crop" not in plain["weights"]
    assert "the weights' makers: bicubic, the middle 0.8" in plain["decided"]["resize"]
    for name, expected in (("plain", ("bilinear", 1.0, 16)), ("theirs", ("bicubic", 0.8, 20))):
        view = view_of(load(parse(shlex.split(f"centralized {shared} --weights {name}"))).model)
        assert (view.interpolation, view.crop, view.resized) == expected
    main(["evaluate", "theirs"])
