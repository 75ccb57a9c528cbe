"""Batches larger than the memory: taken in parts whose gradients add up to the whole batch's."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.devices import Precision, autocast, out_of_memory

log = logging.getLogger(__name__)


class MicroBatch:
    """The number of images that go through the model at once: a whole batch, until memory runs out, then what fitted.

    A mean over the batch is the sum of its parts' means times their shares, so steps are the same up to rounding
    (but for layers that look at the whole batch, such as the BatchNorm of another library's model).
    """

    def __init__(self) -> None:
        self.size: int | None = None
        """None: whole batches."""

    def backward(
        self,
        forward: Callable[[Tensor], Tensor],
        optimizer: Optimizer,
        images: Tensor,
        labels: Tensor,
        precision: Precision = "fp32",
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Leave the batch's gradient, and nothing else; returns its mean loss and number of correct answers, both ().

        ``forward`` maps images to logits (B, C), ``allowed`` (C, C) says which of them count for a label. Logs a
        warning the first time that a size does not fit. Raises the device's own error where a single image does not
        fit.
        """
        while True:
            optimizer.zero_grad(set_to_none=True)
            losses, correct = [], []
            size = self.size or len(images)
            try:
                for x, y in zip(images.split(size), labels.split(size), strict=True):
                    with autocast(x.device, precision):
                        logits = restricted(forward(x), y, allowed)
                    loss = F.cross_entropy(logits.float(), y) * (len(y) / len(labels))
                    loss.backward()
                    losses.append(loss.detach())
                    correct.append(correct_answers(logits, y))
                return torch.stack(losses).sum(), torch.stack(correct).sum()
            except RuntimeError as error:
                tried = min(size, len(images))
                if not out_of_memory(error) or tried == 1:
                    raise
                self.size = -(-tried // 2)
            # Only here is the error gone, and with it the frames that held the activations.
            del losses, correct
            log.warning(
                "%d images at once do not fit into memory: steps add up gradients of %d at a time", tried, self.size
            )
            if images.device.type == "cuda":
                torch.cuda.empty_cache()


def correct_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Count (B, C) logits that are largest at their label, ()."""
    return (logits.argmax(1) == labels).sum()


def restricted(logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
    """Leave those of logits (..., C) that are ``allowed`` (C, C) for the image's label (...); others become -inf."""
    return logits if allowed is None else logits.masked_fill(~allowed[labels], float("-inf"))
