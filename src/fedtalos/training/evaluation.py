"""What a model makes of a set of images, without touching the model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalos.metrics import Metrics
from fedtalos.training.loop import Batches, Precision, autocast, correct_answers


def evaluate(model: nn.Module, batches: Batches, precision: Precision = "fp32") -> Metrics:
    """Summed cross-entropy (nats), correct answers and examples over all batches, in eval mode."""
    return sum(evaluate_batches(model, batches, precision), Metrics())


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Batches,
    precision: Precision = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> list[Metrics]:
    """The metrics of every batch by itself, fetched from the device once, at the end; ``forward`` as of ``train``."""
    model.eval()
    found, examples = [], []
    for images, labels in batches:
        with autocast(images.device, precision):
            logits = (forward or model)(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        found.append(torch.stack([loss, correct_answers(logits, labels).float()]))
        examples.append(len(labels))
    figures = torch.stack(found).tolist() if found else []
    return [Metrics(loss, int(correct), count) for (loss, correct), count in zip(figures, examples, strict=True)]


@torch.inference_mode()
def answers_by_class(model: nn.Module, batches: Batches, num_classes: int, precision: Precision = "fp32") -> Tensor:
    """Correct answers and images of each class, int64 (2, C), on the CPU, in eval mode."""
    model.eval()
    found = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    for images, labels in batches:
        with autocast(images.device, precision):
            right = model(images).argmax(1) == labels
        found[0].append(labels[right].cpu())
        found[1].append(labels.cpu())
    return torch.stack([torch.bincount(torch.cat(labels), minlength=num_classes) for labels in found])
