"""Predictions and confusion: the model's own probabilities and answers, on pixels and on files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fedtalos.checkpoint import save_checkpoint
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.training.confusion import confusion
from fedtalos.training.evaluation import evaluate
from fedtalos.training.feature_cache import view_of
from fedtalos.training.loading import load_trained
from fedtalos.training.prediction import predict

CLASSES = ("a", "b", "c", "d", "e")


@pytest.fixture
def pixels() -> torch.Tensor:
    return (torch.arange(20 * 3 * 8 * 8) * 2654435761 % 256).to(torch.uint8).view(20, 3, 8, 8)


def test_the_classes_are_those_of_the_highest_softmax(vit, pixels):
    expected = vit(view_of(vit)(pixels)).softmax(1)
    found = predict(vit, pixels, CLASSES, top=2, batch_size=7)
    assert [prediction.image for prediction in found] == [str(number) for number in range(20)]
    for prediction, row in zip(found, expected, strict=True):
        values, labels = row.topk(2)
        assert prediction.classes == tuple(CLASSES[label] for label in labels)
        assert prediction.probabilities == pytest.approx(values.tolist())
    assert len(predict(vit, pixels[:1], CLASSES, top=99)[0].classes) == 5


@pytest.mark.parametrize("stored", [8, 4])
def test_files_come_to_the_size_of_the_training_images_first(vit, pixels, stored, tmp_path):
    """So that an image of a data set, saved to a file, is to the model what it was in training."""
    small = pixels[:3, :, :stored, :stored]
    for number, square in enumerate(small):
        Image.fromarray(square.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    vit.stored_size = None if stored == 8 else stored
    of_files, of_pixels = predict(vit, tmp_path, CLASSES), predict(vit, small, CLASSES)
    assert [p.probabilities for p in of_files] == [p.probabilities for p in of_pixels]
    assert [Path(p.image).name for p in of_files] == ["0.png", "1.png", "2.png"]


def test_what_does_not_fit_is_said(vit, pixels):
    with pytest.raises(InputError, match="classes: expected 5 names, got 2"):
        predict(vit, pixels, ("a", "b"))
    with pytest.raises(InputError, match="top 0: expected at least 1"):
        predict(vit, pixels, CLASSES, top=0)


def test_a_trained_model_comes_with_its_view_and_classes(vit, pixels, tmp_path):
    facts = {"model": vit.architecture.as_dict(), "classes": CLASSES, "weights": "none"}
    facts |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic", "crop": 0.9}
    facts |= {"command": "centralized", "options": {"dataset": "digits"}}
    save_checkpoint(tmp_path / "checkpoints" / "mine", "last", 1, dict(vit.state_dict()), facts)
    model, classes = load_trained(tmp_path / "checkpoints" / "mine", device=vit.pos_embed.device.type)
    assert classes == CLASSES
    assert (model.mean, model.std, model.interpolation, model.crop) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "bicubic",
        0.9,
    )
    assert (model.stored_size, model.head_source) == (8, "weights")
    vit.mean, vit.std, vit.interpolation, vit.crop = model.mean, model.std, "bicubic", 0.9
    assert predict(model, pixels, classes) == predict(vit, pixels, CLASSES)
    with pytest.raises(InputError, match=r"no .*best.json"):
        load_trained(tmp_path / "checkpoints" / "mine", which="best")


def test_confusion_counts_what_evaluate_counts(vit, pixels):
    images = LabelledImages(pixels, torch.arange(20) % 4)  # nothing of class e
    found, metrics = confusion(vit, images, batch_size=6), evaluate(vit, images, batch_size=6)
    assert (found.metrics.correct, found.metrics.examples) == (metrics.correct, metrics.examples)
    assert found.metrics.loss == pytest.approx(metrics.loss)
    answers = vit(view_of(vit)(pixels)).argmax(1).cpu()
    for true in range(5):
        for answer in range(5):
            assert found.counts[true, answer] == ((images.labels == true) & (answers == answer)).sum()
    assert found.examples.tolist() == [5, 5, 5, 5, 0]
    mistakes = found.most_confused(99)
    assert sum(count for *_, count in mistakes) == metrics.examples - metrics.correct
    assert [count for *_, count in mistakes] == sorted((count for *_, count in mistakes), reverse=True)
    assert all(true != answer for true, answer, _ in mistakes)
