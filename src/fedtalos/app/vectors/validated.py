"""The alpha that a merged vector is best with, on validation images."""

from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.config.vector import VectorMergeConfig
from fedtalos.app.load import load_images
from fedtalos.app.run.display import say
from fedtalos.app.vectors.base import base_of
from fedtalos.data.class_names import check_same_classes
from fedtalos.data.view import View
from fedtalos.devices import choose_device
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.editing.alpha_search import best_alpha
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.evaluation import evaluate


def validated_alpha(config: VectorMergeConfig, vector: TaskVector, console: Console) -> float:
    """Search alpha by accuracy on the validation images; what was tried is printed.

    Raises InputError where no base is given, or nobody says on which images.
    """
    if config.base is None:
        raise InputError(
            "--alpha auto: is chosen by accuracy on validation images; give --base, what the vectors change"
        )
    base = base_of(config.base, [vector], config.output_dir)
    if config.dataset is None and not base.has_run:
        raise InputError(f"--base {config.base}: weights say nothing of images; give --dataset, too")
    asked = {name: getattr(config, name) for name in ("dataset", "eval_limit")}
    asked["data_dir"] = None if config.data_dir is None else str(config.data_dir)
    options = base.options | {name: value for name, value in asked.items() if value is not None} | {"mask": None}
    run = override(RUN_CONFIGS[base.command](), options, config.base)
    device, model = choose_device(config.device), base.model
    view = View(model.architecture.image_size, model.mean, model.std, crop=model.crop)
    data = load_images(run, view.resized)
    check_same_classes(base.classes, data.classes, f"{config.base}: the vectors'")
    images = data.val.slice(0, run.data.eval_limit).to(device)

    def accuracy(edited: Backbone) -> float:
        return evaluate(edited, images, batch_size=run.data.eval_batch_size).accuracy

    found = best_alpha(model.to(device), vector, accuracy)
    tried = ", ".join(f"{alpha:g}: {100 * value:.2f}" for alpha, value in found.tried.items())
    say(console, f"validation accuracy (%) of {len(images)} images by alpha: {tried}")
    say(console, f"alpha {found.alpha:g}")
    return found.alpha
