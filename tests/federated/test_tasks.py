"""Classes in groups, clients by task, and logits restricted to a task's classes."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedtalos.data.class_groups import SUPERCLASSES, class_groups
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.training.federated.apart import train_apart
from fedtalos.training.federated.fedavg import fedavg
from fedtalos.training.federated.stacked import Kept, stacked
from fedtalos.training.federated.tasks import clients_of_tasks, split_by_task
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.micro_batches import restricted

FINE = sorted(name for names in SUPERCLASSES.values() for name in names.split())


@pytest.fixture
def pictures() -> LabelledImages:
    pixels = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabelledImages(pixels, torch.arange(60) % 5)


@pytest.mark.parametrize("order", ["fixed", "random", "superclass"])
@pytest.mark.parametrize("count", [1, 3, 5, 20])
def test_groups_are_disjoint_cover_all_and_are_alike_in_size(order, count):
    groups = class_groups(FINE, count, order, seed=3)
    assert sorted(number for group in groups for number in group) == list(range(100))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= (5 if order == "superclass" else 1)
    assert groups == class_groups(FINE, count, order, seed=3)


def test_orders_are_what_they_say():
    assert len(FINE) == len(set(FINE)) == 100
    assert class_groups(FINE, 10)[1] == tuple(range(10, 20))
    assert class_groups(FINE, 5, "random", 0) != class_groups(FINE, 5, "random", 1)
    first = class_groups(FINE, 20, "superclass")[0]
    assert [FINE[number] for number in first] == ["beaver", "dolphin", "otter", "seal", "whale"]


@pytest.mark.parametrize(
    ("classes", "count", "order", "says"),
    [
        (FINE, 101, "fixed", "101 groups of 100 classes"),
        (FINE, 21, "superclass", "21 groups of 20 superclasses"),
        (FINE, 0, "random", "0 groups"),
        (["1", "2"], 1, "superclass", "class '1'"),
        (FINE, 5, "alphabet", "expected one of fixed"),
    ],
)
def test_groups_that_do_not_exist_are_refused(classes, count, order, says):
    with pytest.raises(InputError, match=says):
        class_groups(classes, count, order)


@pytest.mark.parametrize("scheme", ["iid", "label_skew", "dirichlet"])
def test_clients_hold_their_tasks_classes_alone(pictures, scheme):
    groups = ((0, 1, 4), (2, 3))
    clients = split_by_task(pictures, 5, groups, scheme, classes_per_client=2, min_client_size=1)
    labels = pictures.labels.numpy()
    for group, own in zip(groups, clients_of_tasks(5, 2), strict=True):
        assert set(np.concatenate([labels[clients[client]] for client in own])) == set(group)
    assert sorted(clients.ids) == list(range(60))


def test_splits_by_task_that_do_not_exist_are_refused(pictures):
    with pytest.raises(InputError, match="every task needs a client"):
        split_by_task(pictures, 1, ((0, 1, 4), (2, 3)))
    with pytest.raises(InputError, match="class 4 is in none"):
        split_by_task(pictures, 2, ((0, 1), (2, 3)))
    with pytest.raises(InputError, match="task 1 of 2"):
        split_by_task(pictures, 4, ((0, 1, 4), (2, 3)), "label_skew", classes_per_client=3)


def test_restricted_logits_are_those_of_the_labels_group(vit):
    local = LocalTraining(groups=((0, 1), (2, 3)))
    allowed = local.allowed(MaskedParameters(vit))
    logits, labels = torch.randn(4, 5, device=allowed.device), torch.tensor([1, 2, 3, 4], device=allowed.device)
    found = F.cross_entropy(restricted(logits, labels, allowed), labels, reduction="none")
    own = [[0, 1], [2, 3], [2, 3], [0, 1, 2, 3, 4]]  # class 4 is in no group
    expected = [-logits[i, labels[i]] + logits[i, classes].logsumexp(0) for i, classes in enumerate(own)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert LocalTraining().allowed(MaskedParameters(vit)) is None


def test_one_group_of_all_classes_changes_nothing_and_a_task_leaves_other_outputs_alone(vit, pictures):
    def trained(groups, ids):
        moving = MaskedParameters(vit)
        theta = moving.copy()
        LocalTraining(steps=2, batch_size=4, optimizer="sgd", weight_decay=0, groups=groups).run(
            moving, pictures, ids, np.random.default_rng(0)
        )
        head = vit.head.weight.detach().clone()
        moving.load(theta)
        return head

    ids, before = np.flatnonzero(pictures.labels.numpy() < 2), vit.head.weight.detach().clone()
    assert trained((), ids).equal(trained(((0, 1, 2, 3, 4),), ids))
    alone = trained(((0, 1), (2, 3, 4)), ids)
    assert alone[2:].equal(before[2:])
    assert not alone[:2].equal(before[:2])


def test_stacks_restrict_logits_as_one_by_one_does(vit, pictures):
    groups = ((0, 1, 4), (2, 3))
    clients = split_by_task(pictures, 4, groups)
    local = LocalTraining(steps=2, batch_size=4, optimizer="sgd", groups=groups)
    found = []
    moving = MaskedParameters(vit)
    theta = moving.copy()
    for engine in ({}, {"engine": partial(stacked, size=4)}):
        moving.load(theta)
        rounds = list(fedavg(moving, clients, local=local, rounds=1, fraction=1, **engine))
        found.append((moving.vector(), rounds[0].train))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1].correct == found[1][1].correct


def test_units_that_train_apart_share_what_was_captured_of_their_steps(vit, pictures, recorded):
    """Two clients of every task, each a stack of one for two rounds: the numbers are those of stacks of their own."""
    clients = split_by_task(pictures, 4, ((0, 1, 4), (2, 3)))
    local = LocalTraining(steps=4, batch_size=4, optimizer="sgd")
    found = []
    for kept in (None, Kept()):
        vectors, engine = {}, partial(stacked, size=1, compile="graph", kept=kept)
        for _ in train_apart(vit, clients, local=local, rounds=2, keep=vectors.__setitem__, engine=engine):
            pass
        found.append([vectors[unit] for unit in range(4)])
        found.append(len(recorded))
    assert all(map(torch.equal, found[0], found[2]))
    assert (found[1], found[3]) == (4, 5)
