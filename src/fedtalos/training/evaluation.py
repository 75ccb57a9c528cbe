"""What a model makes of a set of images, without touching the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtalos.metrics import Metrics
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.training.local import Batches, Precision, autocast


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, precision: Precision = "fp32") -> Metrics:
    """Summed cross-entropy (nats), correct answers and examples over all batches, in eval mode."""
    model.eval()
    total = Metrics()
    for images, labels in batches:
        with autocast(images.device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        total += Metrics(loss.item(), int((logits.argmax(1) == labels).sum()), len(labels))
    return total


@torch.inference_mode()
def extract_features(
    model: VisionTransformer, batches: Batches, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """Class-token features (N, D) float32 and labels (N,), on the CPU, in eval mode."""
    model.eval()
    features, labels = [], []
    for images, batch_labels in batches:
        with autocast(images.device, precision):
            features.append(model.features(images).float().cpu())
        labels.append(batch_labels.cpu())
    return torch.cat(features), torch.cat(labels)
