from functools import reduce
from operator import add

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from fedtalos.randomness import generator
from fedtalos.training.heads import fit_ridge_head, ridge_head, ridge_sums


def data(count=200, width=12, classes=5):
    rng = generator(0, "ridge")
    labels = torch.from_numpy(rng.integers(0, classes, count))
    centres = torch.from_numpy(rng.normal(size=(classes, width))).float()
    return centres[labels] + torch.from_numpy(rng.normal(size=(count, width))).float(), labels


def test_equals_scikit_learn():
    features, labels = data()
    weight, bias = ridge_head(ridge_sums(features, labels, 5), penalty=0.1)
    reference = Ridge(alpha=0.1 * len(features)).fit(features.numpy(), F.one_hot(labels, 5).numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=1e-4, atol=1e-6)


def test_clients_sums_give_the_pooled_head_whatever_the_split():
    features, labels = data()
    pooled = ridge_head(ridge_sums(features, labels, 5), penalty=0.01)
    by_label = [labels == label for label in range(5)]
    sums = reduce(add, [ridge_sums(features[mine], labels[mine], 5) for mine in by_label])
    for ours, expected in zip(ridge_head(sums, penalty=0.01), pooled, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert sums.wire_bytes == 8 * (13 * 14 // 2 + 13 * 5)


def test_temperature_lowers_the_loss_and_keeps_the_answers():
    features, labels = data()
    sums, held_out = ridge_sums(features[:100], labels[:100], 5), (features[100:], labels[100:])
    weight, bias = fit_ridge_head(sums, *held_out, penalties=(0.1,))
    plain = F.linear(held_out[0], *ridge_head(sums, 0.1))
    scaled = F.linear(held_out[0], weight, bias)
    assert torch.equal(plain.argmax(1), scaled.argmax(1))
    assert F.cross_entropy(scaled, held_out[1]) < F.cross_entropy(plain, held_out[1])
