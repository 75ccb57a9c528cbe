"""Loss and accuracy of a checkpoint on a split."""

from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.config.tools import EvaluateConfig
from fedtalos.app.load import load
from fedtalos.app.run.display import say
from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.errors import InputError
from fedtalos.training.evaluation import evaluate


def run(config: EvaluateConfig, console: Console) -> None:
    """Print what the checkpoint reaches on its run's images of that split, as many as asked for."""
    path = find_checkpoint(config.checkpoint, config.output_dir / "checkpoints", config.which)
    facts = load_checkpoint(path).facts
    if facts.get("command") not in ("centralized", "federated"):
        raise InputError(f"checkpoint {path}: holds no trained model (it is of `{facts.get('command')}`)")
    changes: dict[str, object] = {
        "weights": str(path),
        "head": "weights",
        "mask": None,
        "device": config.device,
        "precision": "auto",
    }
    if config.data_dir is not None:
        changes["data_dir"] = str(config.data_dir)
    if config.eval_limit is not None:
        changes["eval_limit"] = config.eval_limit
    if not isinstance(options := facts.get("options"), dict):
        raise InputError(f"checkpoint {path}: is of another version; give another")
    loaded = load(override(RUN_CONFIGS[facts["command"]](), {**options, **changes}, str(path)))
    metrics = evaluate(
        loaded.model,
        loaded.limited(config.split),
        batch_size=loaded.config.data.eval_batch_size,
        precision="bf16" if loaded.config.run.precision == "bf16" else "fp32",
    )
    say(
        console,
        f"{path}: {config.split} loss {metrics.loss:.4f}, accuracy {100 * metrics.accuracy:.2f} % "
        f"({metrics.correct} of {metrics.examples})",
    )
