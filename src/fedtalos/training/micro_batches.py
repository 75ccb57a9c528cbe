"""Batches larger than the memory: taken in parts whose gradients add up to the whole batch's."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

Backward = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(images, labels, share) -> share times the mean loss, whose gradient it adds, and the number of correct answers."""


class MicroBatch:
    """How many images go through the model at once: all of a batch, until memory runs out; from then on, what fitted.

    A mean over the batch is the sum of its parts' means times their shares, so steps are the same up to rounding
    (but for layers that look at the whole batch, as BatchNorm of foreign models does).
    """

    def __init__(self, say: Callable[[str], None] = lambda _text: None) -> None:
        """``say`` is told what does not fit, once per size."""
        self._say = say
        self.size: int | None = None
        """None: whole batches."""

    def backward(
        self, backward: Backward, optimizer: Optimizer, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leave the batch's gradient, and nothing else; returns its mean loss and number of correct answers, both ().

        Raises the device's own error where a single image does not fit.
        """
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                return self._in_parts(backward, images, labels)
            except RuntimeError as error:
                tried = min(self.size or len(images), len(images))
                if not out_of_memory(error) or tried == 1:
                    raise
                self.size = -(-tried // 2)
            # Only here is the error gone, and with it the frames that held the activations.
            self._say(f"{tried} images at once do not fit into memory: steps add up gradients of {self.size} at a time")
            if images.device.type == "cuda":
                torch.cuda.empty_cache()

    def _in_parts(self, backward: Backward, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = self.size or len(images)
        parts = zip(images.split(size), labels.split(size), strict=True)
        losses, correct = zip(*(backward(x, y, len(y) / len(labels)) for x, y in parts), strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out: CUDA has a type for it, MPS a message."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)
