"""timm:NAME and torch:NAME, with stand-ins for both libraries (torchvision cannot be imported beside every torch)."""

import csv
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from sklearn.neighbors import NearestCentroid
from torch import nn

from fedtalos.app.load import load
from fedtalos.app.run import session
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.cli import main, parse
from fedtalos.errors import InputError
from fedtalos.models.library_model import LibraryArchitecture, LibraryModel
from fedtalos.models.load import load_into
from fedtalos.models.weights import library
from fedtalos.models.weights.checkpoints import checkpoint_weights
from fedtalos.models.weights.hub import WeightsFile
from fedtalos.models.weights.pixels import IMAGENET
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import fisher_scores
from fedtalos.training.editing.mask_file import read_mask_file
from fedtalos.training.entries import named_tensors
from fedtalos.training.feature_cache import view_of

CONFIG = {"hf_hub_id": "timm/net", "input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
HASH = "12345678"


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(8), nn.Linear(8, 16)
        self.act, self.fc2 = nn.ReLU(inplace=True), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Net(nn.Module):
    """A stem, two units, a final norm, a classifier; fits 8 px images alone."""

    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Conv2d(3, 8, 2, stride=2)
        self.units = nn.Sequential(Unit(), nn.Dropout(0.5), Unit())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 1000)
        self.register_buffer("index", torch.arange(4))
        self.pretrained_cfg = CONFIG

    def forward(self, x):
        assert x.shape[-1] == 8, "expected 8 px"
        return self.head(self.norm(self.units(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


def build(name: str) -> Net:
    if name == "net":
        return Net()
    if name == "batch_norm":
        return Net(nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8)))
    raise RuntimeError(f"Unknown model {name}")


def create_model(name, *, pretrained, num_classes, pretrained_cfg_overlay=None):
    net = build(name)
    if pretrained:
        net.load_state_dict(pretrained_cfg_overlay["state_dict"], strict=False)
    net.head = nn.Identity()
    return net


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch, in_a_folder_of_its_own, without_figures):
    """Both libraries, with the published weights of their one usable model in the caches."""
    file, cached = tmp_path / "model.safetensors", tmp_path / "hub" / "checkpoints" / f"net-{HASH}.pth"
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    net = Net()
    torch.save(net.state_dict(), cached)
    save_file(dict(net.named_parameters()), file)
    transforms = types.SimpleNamespace(
        crop_size=[8], resize_size=[10], interpolation="bicubic", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]
    )
    default = types.SimpleNamespace(url=f"https://127.0.0.1/net-{HASH}.pth", transforms=lambda: transforms)
    timm, vision, models = (types.ModuleType(name) for name in ("timm", "torchvision", "torchvision.models"))
    timm.create_model = create_model
    models.get_model = lambda name, weights: build(name)
    models.get_model_weights = lambda name: types.SimpleNamespace(DEFAULT=default)
    for module in (timm, vision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(library, "download", lambda repo, file_: WeightsFile(file, [], f"hub:{repo}@1"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_a_checkpoint_of_another_library_model_than_it_says_is_refused(model, tmp_path):
    """A generator: every tensor of the model in turn missing, of another shape, or one more beside them."""
    tensors = named_tensors(model)
    stated = {"model": model.architecture.as_dict(), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": list("abcde")}
    weights = checkpoint_weights(save_checkpoint(tmp_path, "last", 1, tensors, stated))
    assert weights.architecture == model.architecture
    others = [{**tensors, "net.more.weight": torch.zeros(3)}]
    for number, (name, tensor) in enumerate(tensors.items()):
        changed = (tensor[None], tensor[:-1], torch.zeros(0), None)[number % 4]
        others.append({key: changed if key == name else value for key, value in tensors.items()})
    for each in others:
        there = {name: tensor for name, tensor in each.items() if tensor is not None}
        path = save_checkpoint(tmp_path, "last", 1, there, stated)
        with pytest.raises(InputError):
            load_into(model, checkpoint_weights(path))
        if any(each.get(name) is not tensor for name, tensor in tensors.items() if name.startswith("net.")):
            with pytest.raises(InputError, match="its tensors are not those of the timm:net that it says"):
                checkpoint_weights(path)
    for facts in ({"num_classes": 4}, {"name": "timm:batch_norm"}, {"name": "torch:other"}):
        path = save_checkpoint(tmp_path, "last", 1, tensors, {**stated, "model": {**stated["model"], **facts}})
        with pytest.raises(InputError):
            checkpoint_weights(path)


def library_model(name: str) -> LibraryModel:
    return LibraryModel(LibraryArchitecture(name, 8, 5), torch_generator(0, "test"))


@pytest.fixture
def model() -> LibraryModel:
    return library_model("timm:net")


def test_a_normalisation_overrides_the_published_one():
    weights = load_weights("timm:net", normalisation="imagenet")
    assert (weights.mean, weights.std) == IMAGENET


@pytest.mark.parametrize("name", ["timm:net", "torch:net"])
def test_published_weights_come_with_their_image_size_mean_and_source(name):
    model, weights = library_model(name), load_weights(name, "small")
    assert weights.architecture == LibraryArchitecture(name, 8, 0)
    assert (weights.mean, weights.std) == (CONFIG["mean"], CONFIG["std"])
    assert weights.source == {"timm:net": "hub:timm/net@1", "torch:net": f"net-{HASH}.pth"}[name]
    assert load_into(model, weights) == ["head.weight", "head.bias"]
    whole = Net()
    whole.load_state_dict(torch.load(Path("hub", "checkpoints", f"net-{HASH}.pth")))
    whole.head = nn.Identity()
    images = torch.randn(2, 3, 8, 8, generator=torch_generator(0, "images"))
    torch.testing.assert_close(model.features(images), whole.eval()(images), rtol=0, atol=0)


def test_masks_choose_from_all_layers_but_the_first_the_last_norm_and_the_head(model):
    layers = {name.rpartition(".")[0] for name in eligible_entries(model).masks}
    assert layers == {f"net.units.{unit}.{layer}" for unit in (0, 2) for layer in ("norm", "fc1", "fc2")}
    assert all(name.endswith(".bias") for name in eligible_entries(model, "biases").masks)
    assert (model.frozen_stages(["head.weight"]), model.frozen_stages(["net.norm.bias", "head.weight"])) == (1, 0)


def test_it_draws_nothing_while_it_trains(model):
    model.train()
    images = torch.randn(2, 3, 8, 8, generator=torch_generator(0, "images"))
    assert torch.equal(model(images), model(images))


def test_fisher_scores_are_those_of_single_examples(model):
    labels = torch.arange(12) % 5
    images = torch.randn(4, 3, 8, 8, generator=torch_generator(0, "images"))
    masks = eligible_entries(model).masks
    scores = fisher_scores(model, [(images, labels[:4], torch.rand(4, 1))], masks, mode="empirical")
    expected = {name: torch.zeros_like(score) for name, score in scores.items()}
    for image, label in zip(images, labels, strict=False):
        model.zero_grad()
        model(image[None]).log_softmax(1)[0, label].backward()
        for name in expected:
            expected[name] += model.get_parameter(name).grad ** 2
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name])


class Past(Net):
    """Its fc1 is not called, as BEiT's qkv is not: hooks on it see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()

    def forward(self, x):
        first, _, second = self.units
        x = first(self.stem(x).flatten(2).transpose(1, 2))
        return self.norm(x + second.fc2(nn.functional.linear(second.norm(x), *second.fc1.parameters()))).mean(1)


class Unused(Past):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)


def test_a_layer_that_is_not_called_is_not_eligible(monkeypatch):
    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda *_, **__: Past())
    model = library_model("timm:past")
    layers = {"units.0.norm", "units.0.fc1", "units.0.fc2", "units.2.norm", "units.2.fc2"}
    assert model.scorable == {f"net.{layer}" for layer in layers}


def test_parameters_that_do_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda *_, **__: Unused())
    with pytest.raises(InputError, match=r"timm:net: its features do not depend on head\.weight"):
        library_model("timm:net")


DIGITS = shlex.split("--dataset digits --eval_limit 40 --device cpu --train_limit 300")
ROUNDS = shlex.split(
    "--num_clients 4 --client_fraction 0.5 --num_rounds 4 --local_steps 2 --batch_size 16 --eval_every 2"
)


def rows(run: str) -> list[list[str]]:
    with Path("results", run, "metrics.csv").open() as lines:
        return [row[:-1] for row in csv.reader(lines)]


def test_a_mask_is_made_shown_and_trained_under_by_the_real_commands(capsys):
    edit = ["editing", *DIGITS, "--weights", "timm:net", "--calibration_fraction", "0.05", "--num_iterations", "2"]
    main([*edit, "--run_name", "m"])
    mask, facts = read_mask_file(Path("masks/m.safetensors"))
    assert facts.model == {"name": "timm:net", "image_size": 8, "num_classes": 10}
    assert facts.active == round(0.1 * facts.eligible)
    main(["mask", "show", "masks/m.safetensors"])
    assert "linear" in capsys.readouterr().out
    train = ["federated", *DIGITS, *ROUNDS, "--weights", "timm:net", "--mask", "masks/m.safetensors"]
    main([*train, "--run_name", "f"])
    before, after = load_weights("timm:net", "small").tensors, load_checkpoint(Path("checkpoints/f/last.json")).tensors
    for name, tensor in before.items():
        moved = after[name] != tensor
        assert not (moved & ~mask.get(name, torch.zeros_like(moved))).any(), name
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    said = yaml.safe_load(Path("results/f/config.yaml").read_text())
    assert said["made_by"]["weights"]["source"] == "hub:timm/net@1"
    assert (said["model_size"], said["patch_size"], said["image_size"]) == (None, None, 8)
    capsys.readouterr()
    main(["evaluate", "f"])
    accuracy = yaml.safe_load(Path("results/f/summary.yaml").read_text())["test_accuracy"]["last"]
    assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*train, "--weights", "torch:net", "--run_name", "g"])
    assert "not made for this: name timm:net / torch:net" in capsys.readouterr().err


def test_a_resumed_run_equals_an_uninterrupted_one(monkeypatch):
    train = ["federated", *DIGITS, *ROUNDS, "--weights", "torch:net"]
    main([*train, "--run_name", "whole"])
    validate = session.Session.validate

    def stopped(self, evaluate):
        if self.done == 4:
            raise KeyboardInterrupt
        return validate(self, evaluate)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "validate", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main([*train, "--run_name", "cut"])
    main([*train, "--run_name", "cut", "--resume"])
    assert rows("cut") == rows("whole")
    whole, cut = (load_checkpoint(Path("checkpoints", run, "last.json")).tensors for run in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def features(command: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the training images, as the run begins, straight through the model; and labels."""
    loaded = load(parse(command))
    images = loaded.data.train
    with torch.no_grad():
        return loaded.model.features(view_of(loaded.model)(images.pixels)), images.labels


def head(run: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_checkpoint(Path("checkpoints", run, "last.json")).tensors
    return tensors["head.weight"], tensors["head.bias"]


def test_a_head_of_nearest_means_answers_as_scikit_learns():
    command = ["federated", *DIGITS, *ROUNDS, *shlex.split("--weights timm:net --head ncm --freeze_head")]
    main([*command, "--run_name", "n"])
    seen, labels = features(command)
    expected = NearestCentroid().fit(seen.numpy(), labels.numpy()).predict(seen.numpy())
    assert F.linear(seen, *head("n")).argmax(1).tolist() == expected.tolist()


def test_a_linear_head_of_full_batches_is_a_plain_torch_loop():
    options = "--weights timm:net --head linear --head_rounds 5 --freeze_head --num_epochs 1 --batch_size 300"
    command = ["centralized", *DIGITS, *shlex.split(f"{options} --clip_norm None --precision fp32")]
    main([*command, "--run_name", "l"])
    seen, labels = features(command)
    layer = nn.Linear(8, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(layer(seen), labels).backward()
        optimizer.step()
        schedule.step()
    for ours, expected in zip(head("l"), layer.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-6)


def test_with_the_head_alone_features_are_computed_once(monkeypatch):
    calls = []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    main(
        [
            "centralized",
            *DIGITS,
            "--weights",
            "torch:net",
            "--trainable",
            "head",
            "--num_epochs",
            "4",
            "--run_name",
            "h",
        ]
    )
    assert sum(calls) < 2 * 300


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("centralized --weights timm:batch_norm", "keeps stem.1.running_mean beside its parameters"),
        ("centralized --weights timm:other", "timm makes no such model (Unknown model other)"),
        ("centralized --weights torch:other", "torchvision makes no such model (Unknown model other)"),
        ("centralized --weights timm:net --image_size 16", "takes no images of 16 px (expected 8 px)"),
        (
            "centralized --weights timm:net --model_size tiny",
            "--model_size tiny: hub:timm/net@1 is a timm:net; leave it",
        ),
        ("centralized --weights timm:net --patch_size 2", "--patch_size 2: hub:timm/net@1 is a timm:net; leave it out"),
        (
            "centralized --weights timm:net --trainable blocks",
            "--trainable blocks: timm:net has none; give all or head",
        ),
        ("centralized --weights timm:net --head weights", "--head weights: they hold no head for these classes"),
        ("federated --weights timm:net --clients_at_once 2", "--clients_at_once 2: timm:net cannot be stacked"),
        ("editing --weights timm:net --eligible qk", "--eligible qk: masks of timm:net choose from blocks or biases"),
        ("editing --weights timm:net --granularity head", "--granularity head: timm:net says nothing of its heads"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(command, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), *DIGITS])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("results").exists()


@pytest.mark.parametrize(("name", "extra"), [("timm:net", "timm"), ("torch:net", "torchvision")])
def test_a_missing_library_is_named_with_its_extra(name, extra, monkeypatch):
    for module in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{extra} cannot be imported .*pip install .*'\.\[{extra}\]'"):
        load_weights(name, "small")


def test_weights_of_torchvision_that_are_not_to_be_had_are_one_sentence(monkeypatch):
    Path("hub", "checkpoints", f"net-{HASH}.pth").unlink()
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=rf"net-{HASH}.pth could not be fetched \(HF_HUB_OFFLINE is set"):
        load_weights("torch:net", "small")
