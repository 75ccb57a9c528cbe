"""The engine of stacks: its forward and backward passes against the model's own, capture and its eager twin."""

import copy
import logging
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.notes import noted
from fedtalos.randomness import torch_generator
from fedtalos.training.engine import capture
from fedtalos.training.engine import step as steps
from fedtalos.training.engine.ahead import one_ahead
from fedtalos.training.engine.capture import Steps, undone
from fedtalos.training.engine.stacked_model import StackedModel
from fedtalos.training.engine.step import Stack, clip_each
from fedtalos.training.federated.algorithms import FedProx, Scaffold
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

V, BATCH = 3, 2
PLAIN = Architecture("micro", 8, 4, 5)
DINO = Architecture("micro", 8, 4, 5, registers=2, layer_scale=True, class_position=False)


def all_rows(name, tensor):
    return slice(0, len(tensor))


def inner_rows(name, tensor):
    """Neither the first nor the last row, but of tensors that have one."""
    return slice(0, 1) if len(tensor) == 1 else slice(1, len(tensor) - 1)


def weights_alone(name, tensor):
    return slice(0, len(tensor)) if name.endswith("weight") else None


def biases_alone(name, tensor):
    return None if name.endswith("weight") else slice(0, len(tensor))


def last_block(name, tensor):
    return slice(3, 50) if name.startswith("blocks.5.") else None


class Clients:
    """V clients of a model in float64, each with values of its own, in one stack and as V models."""

    def __init__(self, architecture, chosen, passed=0):
        model = VisionTransformer(architecture, torch_generator(0, "weights")).double()
        drawn = torch_generator(0, "values")
        with torch.no_grad():
            for parameter in model.parameters():  # biases of 0 would hide much
                parameter += 0.1 * torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
        rows = {name: chosen(name, p) for name, p in model.named_parameters()}
        self.rows = {name: span for name, span in rows.items() if span is not None}
        self.stacked = StackedModel(model, self.rows, size=V, passed=passed)
        self.models = [copy.deepcopy(model) for _ in range(V)]
        with torch.no_grad():
            for name, stack in self.stacked.moving.items():
                stack += 0.1 * torch.randn(stack.shape, generator=drawn, dtype=torch.float64)
                for own, values in zip(self.models, stack, strict=True):
                    tensor = own.get_parameter(name)[self.rows[name]]
                    tensor.copy_(values.view_as(tensor))
        images = torch.randn(V, BATCH, 3, 8, 8, generator=drawn, dtype=torch.float64)
        self.x = torch.stack([own.run(x, 0, passed).detach() for own, x in zip(self.models, images, strict=True)])
        self.labels = torch.randint(0, 5, (V, BATCH), generator=drawn)


@pytest.mark.parametrize("architecture", [PLAIN, DINO])
@pytest.mark.parametrize("chosen", [all_rows, inner_rows, weights_alone, biases_alone, last_block])
def test_a_stack_computes_what_each_client_s_model_does(architecture, chosen):
    clients = Clients(architecture, chosen)
    logits = clients.stacked(clients.x)
    found = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), clients.labels.flatten(), reduction="sum"),
        list(clients.stacked.moving.values()),
    )
    for place, model in enumerate(clients.models):
        own = model(clients.x[place])
        torch.testing.assert_close(logits[place], own)
        F.cross_entropy(own, clients.labels[place], reduction="sum").backward()
        for (name, span), gradient in zip(clients.rows.items(), found, strict=True):
            expected = model.get_parameter(name).grad[span]
            torch.testing.assert_close(gradient[place].view_as(expected), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("passed", [1, 4, 8])
def test_a_stack_goes_on_from_features_of_frozen_stages(passed):
    def behind(name, tensor):
        part, *rest = name.split(".")
        stage = {"blocks": 1 + int(rest[0]) if part == "blocks" else 0, "norm": 7, "head": 8}.get(part, 0)
        return slice(0, len(tensor)) if stage >= passed else None

    clients = Clients(PLAIN, behind, passed)
    for logits, model, x in zip(clients.stacked(clients.x), clients.models, clients.x, strict=True):
        torch.testing.assert_close(logits, model(x, passed))


def test_bf16_keeps_weights_and_their_gradients_in_float32(vit, images):
    stacked = StackedModel(vit, {"blocks.2.mlp.fc1.weight": slice(4, 90)}, size=V, precision="bf16")
    x = images.view(V, 4, 3, 8, 8)
    logits = stacked(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits[0].float(), vit(x[0]), rtol=0.05, atol=0.05)
    (weight,) = stacked.moving.values()
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), [weight])
    assert weight.dtype == gradient.dtype == torch.float32
    assert gradient.shape == (V, 86, 96)


def test_frozen_values_are_taken_anew_where_they_were_cast(vit, images):
    stacked = StackedModel(vit, {"head.bias": slice(0, 5)}, size=V, precision="bf16")
    before = stacked(images.view(V, 4, 3, 8, 8))
    with torch.no_grad():
        vit.head.weight.zero_()
    stacked.refresh()
    after = stacked(images.view(V, 4, 3, 8, 8))
    assert before.count_nonzero() > 0
    assert after.count_nonzero() == 0


def test_models_of_other_libraries_are_refused(vit):
    class Other(Backbone):
        architecture = PLAIN
        stages = ()

        def frozen_stages(self, moving):
            return 0

    with pytest.raises(InputError, match="cannot be stacked; train its clients one by one"):
        StackedModel(Other(), {}, size=V)


def test_gradients_are_clipped_client_by_client():
    gradients = [torch.ones(2, 4), torch.stack([torch.full((3, 4), 1.0), torch.full((3, 4), 1e-3)])]
    gradients[0][1] *= 1e-3
    clipped, norms = clip_each(gradients, 1.0)
    torch.testing.assert_close(norms, torch.tensor([4.0, 4e-3]))
    assert torch.cat([gradient[0].flatten() for gradient in clipped]).norm() == pytest.approx(1.0)
    assert all(torch.equal(found[1], gradient[1]) for found, gradient in zip(clipped, gradients, strict=True))


def test_gradients_that_share_memory_are_clipped_once():
    whole = torch.full((2, 3), 2.0)  # as autograd gives those of a batch of one image
    (of_all, of_first), _ = clip_each([whole, whole[:, :1]], 1.0)
    assert torch.equal(of_all[:, :1], of_first)


@pytest.fixture
def said(caplog) -> pytest.LogCaptureFixture:
    """What is warned of once in a process, as if nothing had been said yet."""
    capture._said.clear()
    noted()
    caplog.set_level(logging.WARNING)
    return caplog


def two_rounds(vit, rule, algorithm, compile):
    """Values (V, A) after two rounds, each of steps on two images and on one; every client gets other messages."""
    masks = {"blocks.3.attn.qkv.weight": torch.rand(288, 96, generator=torch_generator(0, "m")) < 0.2}
    masks["head.weight"] = torch.ones(5, 96, dtype=torch.bool)
    moving = MaskedParameters(vit, masks)
    local = LocalTraining(optimizer=rule, momentum=0.9, learning_rate=0.1, batch_size=2)
    stack, theta, corrections = Stack(moving, local, V, compile=compile), moving.copy(), []
    device = moving.device
    for number in range(2):
        drawn = torch_generator(number, "round")
        stack.load(theta)
        message = 0.1 * torch.randn(V, len(moving), generator=drawn).to(device)
        corrections.append(stack.adjust_by(algorithm and algorithm.client_side(stack, message, 2)))
        batches = [
            (torch.randn(V, b, 3, 8, 8, generator=drawn), torch.randint(0, 5, (V, b), generator=drawn))
            for b in (2, 1, 2, 2)
        ]
        stack.train([(images.to(device), labels.to(device)) for images, labels in batches], 0.1)
    assert corrections[0] is corrections[1]
    reply = None if corrections[-1] is None else corrections[-1].reply
    return stack.vector(), torch.zeros(0) if reply is None else reply


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("algorithm", [None, FedProx(mu=0.5), Scaffold()])
def test_what_a_captured_step_knows_serves_the_next_round(vit, rule, algorithm, recorded):
    expected = two_rounds(vit, rule, algorithm, "off")
    assert not recorded
    for found, same in zip(two_rounds(vit, rule, algorithm, "graph"), expected, strict=True):
        assert torch.equal(found, same)
    assert len(recorded) == 2  # one for each shape, when it came a second time


def counted(calls):
    def step(x):
        calls.append(tuple(x.shape))
        return x.sum()

    return step


def test_a_shape_is_captured_when_it_has_come_before(recorded):
    calls = []
    run = Steps(counted(calls), compile="graph", after=2)
    for size in (3, 3, 2, 3, 3):
        assert run(torch.ones(size)) == size
    assert len(recorded) == 1
    run.clear()
    assert run(torch.ones(3)) == 3
    assert len(recorded) == 2


def test_steps_that_cannot_be_captured_run_eagerly_and_that_is_said_once(said):
    runs = [Steps(counted([]), compile="graph") for _ in range(2)]
    assert [run(torch.ones(3)).item() for run in runs for _ in range(3)] == [3] * 6
    assert [record.getMessage() for record in said.records] == ["there are no CUDA graphs on cpu: steps run eagerly"]
    assert noted() == {"graphs": "there are no CUDA graphs on cpu: steps run eagerly"}
    Steps(counted([]), compile="on")(torch.ones(3))
    assert not noted()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [(RuntimeError("operation not permitted\nwhen capturing"), False), (torch.OutOfMemoryError("CUDA"), True)],
)
def test_a_capture_that_fails_is_given_up_but_for_memory(error, is_memory, said, monkeypatch):
    def fail(*_):
        try:
            raise error
        finally:
            raise RuntimeError("operation not permitted\nwhen capturing")  # what a broken capture ends with

    monkeypatch.setattr(capture, "DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(capture, "CapturedStep", fail)
    run = Steps(counted([]), compile="graph")
    run(torch.ones(3))
    if is_memory:
        with pytest.raises(torch.OutOfMemoryError):
            run(torch.ones(3))
        return
    assert run(torch.ones(3)) == run(torch.ones(3)) == 3
    assert [record.getMessage() for record in said.records] == [
        "a step cannot be captured as a CUDA graph (operation not permitted): steps run eagerly"
    ]


def test_what_cannot_be_compiled_runs_as_it_stands(vit, said, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C compiler\nand pages more")

    expected = two_rounds(vit, "sgd", None, "off")
    monkeypatch.setattr(steps, "compiled", lambda _: fail)
    for found, same in zip(two_rounds(vit, "sgd", None, "on"), expected, strict=True):
        assert torch.equal(found, same)
    assert [record.getMessage() for record in said.records] == [
        "torch.compile failed (no C compiler): steps run without it"
    ]


def test_whole_batches_alone_are_compiled(vit, monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "compiled", lambda forward: lambda x, y: seen.append(y.shape[1]) or forward(x, y))
    two_rounds(vit, "sgd", None, "on")
    on_a_cpu, captured = 6, 4  # the first step, two to warm up and the capture: the others are replayed
    assert seen == [2] * (on_a_cpu if vit.head.weight.device.type == "cpu" else captured)


def test_undone_steps_leave_what_was_and_zero_what_is_new():
    there, new = torch.ones(2), []
    with undone(lambda: [there, *new]):
        there.add_(1)
        new.append(torch.ones(2))
    assert there.tolist() == [1, 1]
    assert new[0].tolist() == [0, 0]


class Streams:
    """CUDA's streams as one_ahead uses them, with everything done at once: only the order of calls is the same."""

    current = "main"

    def __init__(self, *_):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    @staticmethod
    @contextmanager
    def stream(side):
        Streams.current = "side"
        yield
        Streams.current = "main"


def test_batches_are_made_one_ahead_in_two_places(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    monkeypatch.setattr(torch.cuda, "current_stream", Streams)
    monkeypatch.setattr(torch.cuda, "stream", Streams.stream)
    made = []

    def batches():
        for number, size in enumerate((2, 2, 2, 1, 2)):
            made.append((number, Streams.current))
            yield torch.full((size, 3), float(number)), torch.full((size,), number)

    places = set()
    for number, (images, labels) in enumerate(one_ahead(batches(), torch.device("cuda"))):
        assert made == [(n, "side") for n in range(min(number + 2, 5))]
        assert images.unique().tolist() == labels.unique().tolist() == [number]
        assert Streams.current == "main"
        places.add(images.data_ptr())
    assert number == 4
    assert len(places) == 3  # two of whole batches, one of the small one
    passed_on = batches()
    assert next(iter(one_ahead(passed_on, torch.device("cpu"))))[0].shape == (2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, as it imports its compiler
def test_a_compiled_stack_computes_the_same(vit):
    moving = MaskedParameters(vit, {"blocks.5.attn.qkv.weight": torch.rand(288, 96) < 0.2})
    found = []
    for way in ("off", "on"):
        stack = Stack(moving, LocalTraining(optimizer="sgd", batch_size=2), V, compile=way)
        stack.load(moving.copy())
        drawn = torch_generator(0, "images")
        stack.train([(torch.randn(V, 2, 3, 8, 8, generator=drawn), torch.ones(V, 2, dtype=torch.int64))], 0.1)
        found.append(stack.vector())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, as it imports its compiler
@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_compiles_without_a_break(vit, masked):
    mask = {"blocks.2.attn.qkv.weight": torch.arange(288).unsqueeze(1).expand(288, 96) % 5 == 1} if masked else None
    local = LocalTraining(groups=((0, 1), (2, 3, 4)) if masked else (), precision="bf16" if masked else "fp32")
    stack = Stack(MaskedParameters(vit, mask), local, V)
    images, labels = torch.randn(V, 2, 3, 8, 8), torch.ones(V, 2, dtype=torch.int64)
    forward = torch.compile(stack._losses, backend="aot_eager", fullgraph=True, dynamic=False)
    found = stack._passed(forward, images, labels)
    for ours, theirs in zip(found, stack._passed(stack._losses, images, labels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("algorithm", [None, FedProx(mu=0.5), Scaffold()])
def test_graphs_compute_what_eager_steps_do(vit, rule, algorithm):
    torch.set_float32_matmul_precision("highest")
    model = vit.cuda()
    expected, found = (two_rounds(model, rule, algorithm, way) for way in ("off", "graph"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
