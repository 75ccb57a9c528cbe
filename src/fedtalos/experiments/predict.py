"""Most probable classes of photos, with a trained model: as a table, as JSON or as CSV."""

import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtalos.app.config.after_training import PredictConfig
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import say_notes
from fedtalos.app.run.recorder import table_text
from fedtalos.app.trained import open_trained
from fedtalos.data.photos import open_photos
from fedtalos.errors import InputError, printable
from fedtalos.training.prediction import Prediction, predict


def run(config: PredictConfig, console: Console) -> None:
    """Print the classes of every image; what was decided on the way goes to stderr, so that output can be piped."""
    if config.json and config.csv:
        raise InputError("--json and --csv: each is a form of the output; give one of them")
    if not config.images:
        raise InputError("predict: expected images after the run: files, folders, or patterns in quotes")
    trained = open_trained(config.run, config.output_dir, config.which, config.device)
    photos = open_photos(config.images, bar)
    predictions = predict(trained.model, photos, trained.classes, top=config.top, bar=bar)
    say_notes(Console(stderr=True))
    if config.json:
        console.out(as_json(predictions), highlight=False)
    elif config.csv:
        console.out(as_csv(predictions), highlight=False, end="")
    else:
        console.print(as_table(predictions))


def as_json(predictions: Sequence[Prediction]) -> str:
    """Write a list of objects, one per image.

    >>> as_json([Prediction("cat.jpg", ("cat",), (0.9,))])
    '[\\n {\\n  "image": "cat.jpg",\\n  "classes": [{"name": "cat", "probability": 0.9}]\\n }\\n]'
    """
    found = [
        {
            "image": prediction.image,
            "classes": [
                {"name": name, "probability": round(probability, 6)}
                for name, probability in zip(prediction.classes, prediction.probabilities, strict=True)
            ],
        }
        for prediction in predictions
    ]
    return json.dumps(found, indent=1)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Write a line per image and class, the most probable class first: image, rank, class, probability."""
    lines = [
        (prediction.image, rank, name, f"{probability:.6f}")
        for prediction in predictions
        for rank, (name, probability) in enumerate(
            zip(prediction.classes, prediction.probabilities, strict=True), start=1
        )
    ]
    return table_text([("image", "rank", "class", "probability"), *lines])


def as_table(predictions: Sequence[Prediction]) -> Table:
    """Make a table of a line per image: its classes, each with its probability in per cent."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("image", overflow="fold")
    table.add_column("classes (probability, %)", overflow="fold")
    for prediction in predictions:
        classes = ", ".join(
            f"{name} {100 * probability:.1f}"
            for name, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        )
        table.add_row(Text(printable(prediction.image)), Text(printable(classes)))
    return table
