"""Letters and the wire: what is sent comes back bit for bit, and nothing else is read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from local_post import LocalPost, carried
from test_contract import in_a_fleet, nodes

from fedtalos.errors import InputError
from fedtalos.fleet.frozen import frozen_part, read_frozen_part, shapes_of
from fedtalos.fleet.gathering import Terms
from fedtalos.fleet.letter import TYPES, Letter
from fedtalos.fleet.node import Node
from fedtalos.fleet.wire import BLOCK, pack, unpack
from fedtalos.training.editing.controls import random_mask
from fedtalos.training.entries import named_tensors
from fedtalos.training.masked_parameters import MaskedParameters

folders = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


@given(st.sampled_from(sorted(TYPES)).flatmap(lambda kind: arrays(kind, st.integers(0, 40))))
def test_letters_come_back_bit_for_bit(array):
    letter = Letter("train", {"round": 3, "why": "ä\n", "nested": [1, None]}, {"theta": array})
    for way in (carried, lambda letter: Letter.read(letter.written())):
        back = way(letter)
        assert (back.kind, back.facts) == (letter.kind, letter.facts)
        assert back.arrays["theta"].dtype == array.dtype
        assert back.arrays["theta"].tobytes() == array.tobytes()


@given(st.binary(max_size=200))
def test_what_is_no_letter_is_refused(content):
    with pytest.raises(InputError):
        Letter.read(content)


def test_objects_are_no_letter():
    with pytest.raises(InputError, match="object"):
        Letter("train", {}, {"theta": np.array([{}, {}])})


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_what_the_wire_loses_comes_later(wire):
    """After many rounds the sum of what arrived is the sum of what was sent, but for one round's loss."""
    rng = torch.Generator().manual_seed(0)
    theta, lost = torch.zeros(3 * BLOCK + 7), None
    sent = arrived = torch.zeros_like(theta)
    for _ in range(20):
        update = torch.randn(len(theta), generator=rng)
        packed, lost = pack(wire, theta + update, theta, lost)
        sent, arrived = sent + update, arrived + unpack(packed, theta)
    assert (sent - arrived).abs().max() < {"float16": 2e-3, "bfloat16": 2e-2, "int8": 3e-2}[wire]


def test_bytes_of_the_wires():
    theta = torch.zeros(10 * BLOCK)
    sizes = {
        wire: sum(a.nbytes for a in pack(wire, theta, theta, None)[0].values())
        for wire in ("float32", "float16", "int8")
    }
    assert sizes == {"float32": 4 * len(theta), "float16": 2 * len(theta), "int8": len(theta) + 4 * 10}


@pytest.mark.parametrize("density", [0.1, None])
def test_the_frozen_part_has_every_frozen_value_and_the_mask(vit, density):
    moving = MaskedParameters(vit, None if density is None else random_mask(vit, density))
    content = frozen_part(moving)
    tensors, mask = read_frozen_part(content, shapes_of(moving))
    assert all(torch.equal(mask[name], tensor) for name, tensor in moving.entries.masks.items())
    for name, tensor in named_tensors(vit).items():
        still = ~mask.get(name, torch.zeros_like(tensor, dtype=torch.bool))
        assert torch.equal(tensors[name][still], tensor[still])
    moving.write(torch.randn(len(moving)))
    assert frozen_part(moving) == content  # however far training has come
    with pytest.raises(InputError):
        read_frozen_part(content[:-9], shapes_of(moving))
    with pytest.raises(InputError, match="other tensors"):
        read_frozen_part(content, {"head.weight": [2, 2]})
    for shape in ([2**20, 2**11], [-1]):  # refused before memory is taken
        with pytest.raises(InputError, match="entries"):
            read_frozen_part(content, {**shapes_of(moving), "head.weight": shape})


@folders
def test_a_node_sends_nothing_but_sums_and_values_of_what_moves():
    """Every letter of every node: its facts and arrays are on this list, and no array is of images."""
    post = in_a_fleet("--algorithm scaffold --optimizer sgd --trainable head")
    moving = yaml.safe_load(Path("results/fleet/summary.yaml").read_text())["moving_parameters"]
    allowed = {
        "hello": ({"client", "version"}, set()),
        "need": ({"still"}, set()),
        "begun": ({"run", "images"}, set()),
        "update": ({"loss_sum", "correct", "examples"}, {"values", "reply"}),
    }
    for letter in post.seen:
        facts, arrays = allowed[letter.kind]
        assert set(letter.facts) <= facts
        assert set(letter.arrays) <= arrays
        assert all(array.shape == (moving,) for array in letter.arrays.values())
    assert {letter.kind for letter in post.seen} == set(allowed)


@folders
def test_what_a_node_sends_in_one_round_are_sums_over_its_images():
    """The same of a run of one round, which has most kinds of letters."""
    post = in_a_fleet("--one_shot --merge fisher --merge_alpha 0.5 --head random --trainable head --client_evaluation")
    allowed = {
        "hello": ({"client", "version"}, set()),
        "need": ({"still"}, set()),
        "begun": ({"run", "images", "classes"}, set()),
        "update": ({"loss_sum", "correct", "examples"}, {"values"}),
        "weights": (set(), {"head.weight", "head.bias"}),
        "sums": (set(), {"xy", "xx"}),
        "accuracy": ({"accuracy"}, set()),
    }
    for letter in post.seen:
        facts, arrays = allowed[letter.kind]
        assert set(letter.facts) <= facts
        assert set(letter.arrays) <= arrays
    assert {letter.kind for letter in post.seen} == set(allowed)


@folders
@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_fewer_bits_train_as_well(wire):
    post = in_a_fleet("--num_rounds 2", terms=Terms(patience=60, wire=wire))
    updates = [letter for letter in post.seen if letter.kind == "update"]
    assert all(letter.arrays["update"].dtype.name == {"bfloat16": "uint16"}.get(wire, wire) for letter in updates)


@folders
def test_a_node_admits_what_its_owner_says_alone():
    post = LocalPost(nodes(admit=("evaluate",)))
    node = post.by_number[100]
    assert node.answer(Letter("train", {"run": 64 * "0"})).facts["why"].startswith("this node does not admit 'train'")
    other = Node(nodes()[0].options.model_copy(update={"dataset": "cifar10"}), node.state)
    in_a_fleet()
    begin = json.loads(next((node.state / "runs").glob("*.json")).read_text())
    answer = other.answer(Letter("begin", begin["facts"]))
    assert (answer.kind, answer.facts["why"]) == ("refused", "this node admits the data set cifar10, not 'digits'")


@folders
@pytest.mark.parametrize("run", ["../../etc/passwd", 7, "", 64 * "g"])
def test_names_from_the_network_are_no_paths(run):
    for kind in ("train", "begin"):
        answer = nodes()[0].answer(Letter(kind, {"run": run, "still": run}))
        assert answer.kind == "refused"
