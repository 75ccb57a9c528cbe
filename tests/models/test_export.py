"""Exports: equal to the model, by the loaders of the libraries that they are for, where these are installed."""

import json
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtalos.errors import InputError
from fedtalos.models.export import folder as exporting
from fedtalos.models.export.folder import export_model, files_of
from fedtalos.models.library_model import LibraryArchitecture, LibraryModel
from fedtalos.models.load import load_into
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator

CLASSES = ("cat", "dog", "<b>fox</b>")
VARIANTS = {
    "plain": {},
    "layer scale": {"layer_scale": True},
    "registers": {"layer_scale": True, "registers": 2, "class_position": False},
    "registers and a class position": {"layer_scale": True, "registers": 2},
    "registers without layer scale": {"registers": 2},
}
theirs = pytest.mark.filterwarnings("ignore")
"""Other libraries warn of many things."""


def model_of(variant: str = "plain") -> VisionTransformer:
    """A model in which every term shows in the logits, with pixels and resizing of its own."""
    generator = torch_generator(0, "export", variant)
    model = VisionTransformer(Architecture("micro", 8, 4, len(CLASSES), **VARIANTS[variant]), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.mean, model.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model.interpolation, model.crop = "bicubic", 0.5
    return model.eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch_generator(0, "pixels"))


def logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(pixels)
    return getattr(found, "logits", found)


# without other libraries


@pytest.mark.parametrize("format", ["safetensors-timm", "hf"])
def test_our_own_reader_gets_back_what_was_exported(format, tmp_path):
    model = model_of()
    folder = export_model(model, CLASSES, tmp_path / "out", format)
    weights = load_weights(str(folder / "model.safetensors"), "micro")
    assert (weights.mean, weights.std) == (model.mean, model.std)
    assert (weights.interpolation, weights.crop) == ("bicubic", 0.5)
    assert weights.architecture == model.architecture
    again = VisionTransformer(model.architecture, torch_generator(1, "another"))
    assert load_into(again, weights) == []
    assert all(torch.equal(ours, back) for ours, back in zip(model.parameters(), again.parameters(), strict=True))


def test_pixels_and_names_stand_where_each_format_keeps_them(tmp_path):
    model = model_of()
    timm = json.loads(files_of(model, CLASSES, "safetensors-timm")["config.json"])
    assert timm["label_names"] == list(CLASSES)
    assert timm["pretrained_cfg"].items() >= {"mean": [0.1, 0.2, 0.3], "input_size": [3, 8, 8], "crop_pct": 0.5}.items()
    hf = {name: json.loads(content) for name, content in files_of(model, CLASSES, "hf").items() if "json" in name}
    assert hf["config.json"]["id2label"] == {"0": "cat", "1": "dog", "2": "<b>fox</b>"}
    preprocessor = hf["preprocessor_config.json"]
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (preprocessor["size"], preprocessor["resample"]) == ({"shortest_edge": 16}, 3)
    assert preprocessor["crop_size"] == {"height": 8, "width": 8}


@theirs
def test_torchscript_gives_the_same_logits_for_any_number_of_images(tmp_path, pixels):
    model = model_of("registers")
    folder = export_model(model, CLASSES, tmp_path / "out", "torchscript", beside={"README.md": "# mine"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.pt", "preprocessor_config.json"]
    extra = {"config.json": ""}
    opened = torch.jit.load(str(folder / "model.pt"), _extra_files=extra)
    for count in (1, 3, 4):
        torch.testing.assert_close(logits(opened, pixels[:count]), logits(model, pixels[:count]))
    assert json.loads(extra["config.json"])["classes"] == list(CLASSES)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model, out = model_of(), tmp_path / "deep" / "out"
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export_model(model, CLASSES, tmp_path / "there", "hf")

    def full(path: Path, content: bytes) -> None:
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(exporting, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        export_model(model, CLASSES, out, "hf")
    assert list(out.parent.iterdir()) == []


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = model_of().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files_of(model, CLASSES, "hf")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_exported_is_said(monkeypatch):
    with pytest.raises(InputError, match="expected 3 names, one per output of the head, got 2"):
        files_of(model_of(), CLASSES[:2], "hf")
    with pytest.raises(InputError, match="format 'gguf': expected one of safetensors-timm, hf, torchscript, onnx"):
        files_of(model_of(), CLASSES, "gguf")
    vision = types.ModuleType("torchvision.models")
    vision.get_model = lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 5))
    monkeypatch.setattr("fedtalos.models.library_model.library", lambda *_: vision)
    other = LibraryModel(LibraryArchitecture("torch:net", 8, 3), torch_generator(0, "net"))
    for format in ("safetensors-timm", "hf"):
        with pytest.raises(InputError, match=f"format {format}: .*torch:net"):
            files_of(other, CLASSES, format)
    assert "model.pt" in files_of(other, CLASSES, "torchscript")


def test_onnx_says_what_is_to_be_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"format onnx: onnx\w* is not installed; .*\[onnx\]"):
        files_of(model_of(), CLASSES, "onnx")


# by other libraries


@theirs
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_opens_it(variant, tmp_path, pixels):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model = model_of(variant)
    folder = export_model(model, CLASSES, tmp_path / "out")
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(logits(opened, pixels), logits(model, pixels))
    config = timm.data.resolve_model_data_config(opened)
    assert (config["mean"], config["interpolation"], config["crop_pct"]) == ([0.1, 0.2, 0.3], "bicubic", 0.5)
    assert opened.pretrained_cfg["label_names"] == list(CLASSES)


@theirs
def test_timm_opens_its_own_models_with_our_head(tmp_path):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model = LibraryModel(LibraryArchitecture("timm:convnext_atto.d2_in1k", 32, 3), torch_generator(0, "net")).eval()
    folder = export_model(model, CLASSES, tmp_path / "out")
    images = torch.randn(2, 3, 32, 32, generator=torch_generator(0, "images"))
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(logits(opened, images), logits(model, images))


@theirs
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_it(variant, tmp_path, pixels):
    transformers = pytest.importorskip("transformers")
    model = model_of(variant)
    folder = export_model(model, CLASSES, tmp_path / "out", "hf")
    opened, said = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    torch.testing.assert_close(logits(opened.eval(), pixels), logits(model, pixels))
    assert opened.config.id2label[2] == "<b>fox</b>"


@theirs
def test_transformers_prepares_images_as_ours_are(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    image = pytest.importorskip("PIL.Image")
    from fedtalos.data.decoding import decode_image
    from fedtalos.data.deep_images import Scale
    from fedtalos.training.feature_cache import view_of

    model = model_of()
    waves = (torch.arange(40 * 30 * 3).mul(0.01).sin() * 100 + 128).byte().view(30, 40, 3)
    image.fromarray(waves.numpy()).save(tmp_path / "photo.png")
    folder = export_model(model, CLASSES, tmp_path / "out", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(image.open(tmp_path / "photo.png"), return_tensors="pt")["pixel_values"]
    square = decode_image(tmp_path / "photo.png", view_of(model).resized, Scale(0, 255)).pixels
    ours = view_of(model)(torch.from_numpy(square).permute(2, 0, 1)[None])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.1  # they scale by another filter


@theirs
@pytest.mark.parametrize("variant", ["plain", "registers"])
def test_onnxruntime_opens_it(variant, tmp_path, pixels):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = model_of(variant)
    folder = export_model(model, CLASSES, tmp_path / "out", "onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "preprocessor_config.json"]
    session = runtime.InferenceSession(folder / "model.onnx")
    for count in (1, 4):
        (found,) = session.run(["logits"], {"pixel_values": pixels[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(model, pixels[:count]), atol=1e-4, rtol=0)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list(CLASSES)
    assert json.loads(said["image_mean"]) == [0.1, 0.2, 0.3]


@theirs
def test_onnx_that_differs_is_not_written(tmp_path, monkeypatch):
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.setattr("fedtalos.models.export.onnx.parity", lambda *_: float("nan"))
    with pytest.raises(InputError, match=r"logits differ from the model's by nan, and 0\.0001 is the most"):
        export_model(model_of(), CLASSES, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
