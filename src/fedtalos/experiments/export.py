"""A trained model written for other libraries, with a model card beside it."""

from rich.console import Console

from fedtalos.app.config.after_training import ExportConfig
from fedtalos.app.model_card import check_license, model_card
from fedtalos.app.run.display import say
from fedtalos.app.trained import open_trained
from fedtalos.files import refuse_link
from fedtalos.models.export.folder import check_new, export_model


def run(config: ExportConfig, console: Console) -> None:
    """Write the folder, whole or not at all; print its files."""
    check_license(config.license)
    trained = open_trained(config.run, config.output_dir, config.which)
    folder = config.folder or config.output_dir / "exports" / trained.name / config.format
    if config.folder is None:
        refuse_link(folder.parent)
    check_new(folder)
    card = model_card(trained, config.format, config.license)
    export_model(trained.model, trained.classes, folder, config.format, beside={"README.md": card})
    for path in sorted(folder.iterdir()):
        say(console, str(path))
