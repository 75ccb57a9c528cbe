"""Runs on image folders whose classes changed since training: a sentence that names them."""

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from fedtalos.cli import main

SMALL = (
    "--dataset folder --data_dir photos --model_size micro --weights none --image_size 8 --patch_size 4 --device cpu"
)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


@pytest.fixture
def trained(in_a_folder_of_its_own):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 10, 8, 8, 3), dtype=np.uint8)
    for name, images in zip(("cat", "dog", "fox"), pixels, strict=True):
        (in_a_folder_of_its_own / "photos" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(f"photos/{name}/{number}.png")
    main(["centralized", *SMALL.split(), "--num_epochs", "1", "--run_name", "pets"])
    return in_a_folder_of_its_own


def refusal(command: str, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_was_decided_is_in_config_yaml(trained):
    decided = yaml.safe_load((trained / "results/pets/config.yaml").read_text())["made_by"]["decided"]
    assert decided["images"] == "train 30: cat 10, dog 10, fox 10"
    assert decided["validation images"].startswith("2, drawn from the training images")


def test_other_classes_are_named(trained, capsys):
    (trained / "photos/fox").rename(trained / "photos/owl")
    says = refusal("evaluate pets", capsys)
    assert "pets/last.json knows 3 classes and the data have 3, without 'fox', with new 'owl': give the data" in says
    (trained / "results/pets/summary.yaml").unlink()
    says = refusal(f"centralized {SMALL} --num_epochs 1 --resume --run_name pets", capsys)
    assert "--resume: " in says
    assert "without 'fox', with new 'owl'" in says
    shutil.rmtree(trained / "photos/owl")
    assert "knows 3 classes and the data have 2, without 'fox'" in refusal("evaluate pets", capsys)


def test_other_images_of_the_same_classes_are_no_other_classes(trained, capsys):
    (trained / "photos/fox/9.png").unlink()
    main(["evaluate", "pets"])
    (trained / "results/pets/summary.yaml").unlink()
    says = refusal(f"centralized {SMALL} --num_epochs 1 --resume --run_name pets", capsys)
    assert "the data of pets changed since it started" in says
