"""predict, evaluate by class, explain and export, as people call them, on one small run."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import CENTRALIZED, SMALL, refused
from PIL import Image

from fedtalos.app.figures import draw
from fedtalos.cli import main
from fedtalos.data.dataset_loader import load_dataset
from fedtalos.experiments import report
from fedtalos.models.weights.read import load_weights

EDIT = ["editing", *SMALL, "--criterion", "random", "--head", "random", "--num_iterations", "1", "--run_name", "m"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the finished run `a`, trained under a mask, and its 20 test images as files."""
    folder = tmp_path_factory.mktemp("after")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for figure in ("plot_run", "plot_masks", "plot_iterations"):
            patched.setattr(draw, figure, lambda *_, **__: [])
        main(EDIT)
        main([*CENTRALIZED, "--run_name", "a", "--mask", "masks/m.safetensors"])
        test = load_dataset("digits").test
        for number in range(20):
            file = Path(f"photos/{test.labels[number]}/{number}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(test.pixels[number].permute(1, 2, 0).numpy()).save(file)
    return folder


@pytest.fixture(autouse=True)
def there(made, tmp_path, monkeypatch):
    """A copy of that folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def said(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    main(arguments)
    return capsys.readouterr().out


# predict


def test_predict_answers_as_a_table_as_json_and_as_csv(capsys):
    table = said(["predict", "a", "photos", "--top", "2"], capsys)
    assert sum("photos/" in line for line in table.splitlines()) == 20
    found = json.loads(said(["predict", "checkpoints/a/last.json", "photos/*/*.png", "--top", "2", "--json"], capsys))
    assert len(found) == 20
    assert all(len(one["classes"]) == 2 for one in found)
    assert all(one["classes"][0]["probability"] >= one["classes"][1]["probability"] for one in found)
    rows = list(csv.DictReader(io.StringIO(said(["predict", "a", "photos", "--csv"], capsys))))
    assert len(rows) == 100
    assert {row["image"]: row["class"] for row in rows if row["rank"] == "1"} == {
        one["image"]: one["classes"][0]["name"] for one in found
    }


def test_predict_says_in_pipes_only_what_was_asked_for(capsys):
    Path("photos/notes.txt").write_text("x")
    capsys.readouterr()
    main(["predict", "a", "photos", "--json"])
    out, err = capsys.readouterr()
    json.loads(out)
    assert "left out: files that are no images: 1 (photos/notes.txt)" in err


# evaluate


def test_a_folder_of_the_test_images_gives_the_test_accuracy(capsys):
    on_split = said(["evaluate", "a"], capsys).partition(" accuracy ")[2]
    on_folder = said(["evaluate", "a", "--folder", "photos"], capsys)
    assert on_folder.startswith("checkpoints/a/last.json: photos loss")
    assert on_folder.partition(" accuracy ")[2] == on_split


def test_evaluate_by_class_leaves_tables_that_add_up_and_a_figure(capsys):
    plain = said(["evaluate", "a"], capsys)
    by_class = said(["evaluate", "a", "--per_class", "--confusion"], capsys)
    assert by_class.splitlines()[0] == plain.splitlines()[0]
    folder = Path("evaluations/a")
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion_test.csv",
        "confusion_test.png",
        "per_class_test.csv",
    ]
    header, *rows = csv.reader((folder / "confusion_test.csv").read_text().splitlines())
    counts = [list(map(int, row[1:])) for row in rows]
    assert header == ["true class", *map(str, range(10))]
    assert sum(map(sum, counts)) == 20
    for label, row in enumerate(csv.DictReader((folder / "per_class_test.csv").read_text().splitlines())):
        images, correct = sum(counts[label]), counts[label][label]
        assert (int(row["images"]), int(row["correct"])) == (images, correct)
        assert row["recall"] == (f"{correct / images:.6f}" if images else "")
        assert int(row["answers"]) == sum(line[label] for line in counts)
    said(["evaluate", "a", "--folder", "photos", "--confusion"], capsys)
    assert (folder / "confusion_photos.csv").read_bytes() == (folder / "confusion_test.csv").read_bytes()


# explain


def test_explain_draws_a_figure_for_each_photo(capsys):
    shutil.copy("photos/0/11.png" if Path("photos/0/11.png").exists() else next(Path("photos").glob("*/*")), "a.png")
    Path("more").mkdir()
    shutil.copy("a.png", "more/a.png")
    drawn = said(["explain", "a", "a.png", "more", "--target", "7"], capsys).splitlines()
    assert drawn == ["plots/a/explain_a.png", "plots/a/explain_a_2.png"]
    assert Path(drawn[0]).read_bytes() == Path(drawn[1]).read_bytes()


# report


def test_a_run_ends_with_the_page_that_report_makes(capsys, monkeypatch):
    page = Path("plots/a/report.html")
    at_the_end = page.read_text()
    said(["report", "a"], capsys)
    begin, end = "<h1>", "<h2>How it was made"  # what follows names files, of which there are more by now
    assert "<h2>Classes" in at_the_end
    assert at_the_end[at_the_end.index(begin) : at_the_end.index(end)] in page.read_text()
    monkeypatch.setattr(report, "MOST_CLASSES", 5)
    assert "10 classes are too many for a page" in refused(["report", "a"], capsys)
    said(["report", "a", "--no_classes"], capsys)
    assert "<h2>Classes" not in page.read_text()


# export


def fields(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_export_leaves_a_folder_with_a_card_that_says_what_is_known(capsys):
    written = said(["export", "a", "--format", "hf", "--license", "apache-2.0"], capsys).splitlines()
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert written == [f"exports/a/hf/{name}" for name in names]
    assert load_weights("exports/a/hf/model.safetensors", "micro").architecture.image_size == 8
    card = Path("exports/a/hf/README.md").read_text()
    about = fields(card)
    assert about["license"] == "apache-2.0"
    assert (about["library_name"], about["pipeline_tag"]) == ("transformers", "image-classification")
    accuracy = yaml.safe_load(Path("results/a/summary.yaml").read_text())["test_accuracy"]["last"]
    (result,) = about["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(accuracy, abs=1e-4)
    assert f"{100 * accuracy:.2f} %, 95 % interval" in card
    assert "10.0 % of the weights, by the mask m.safetensors (random" in card
    assert str(Path.cwd()) not in card


def test_a_card_without_records_says_so_and_makes_nothing_up(capsys):
    for place in ("results", "masks"):
        shutil.rmtree(place)
    said(["export", "a", "--folder", "out"], capsys)
    card = Path("out/README.md").read_text()
    assert "Nobody knows: the run is not finished" in card
    assert "which is no longer there" in card
    assert "model-index" not in fields(card)
    assert fields(card)["license"] == "unknown"


def test_a_card_shows_odd_names_as_they_are(capsys, monkeypatch):
    from fedtalos.app import model_card
    from fedtalos.app.trained import open_trained

    trained = open_trained(Path("a"), Path(), "last")
    odd = ("<script>", "=cmd()", "$x$", "a|b\nc", "*bold*", *trained.classes[5:])
    monkeypatch.setattr(type(trained), "name", "a: [b]")
    object.__setattr__(trained, "classes", odd)
    card = model_card.model_card(trained, "onnx", None)
    assert fields(card)["model-index"][0]["name"] == "a: [b]"
    assert "&lt;script&gt;, =cmd(), $x$, a\\|b\\\\nc, \\*bold\\*" in card


@pytest.mark.parametrize(
    ("name", "said", "on_the_hub"),
    [
        ("hf:me/pets/small,label=breed", "hf:me/pets/small,label=breed", ["me/pets"]),
        ("hf:secret/pets", "a folder called pets", None),
        ("hf:~/secret/pets", "a folder called pets", None),
        ("hf:/home/secret/pets,client=owner", "a folder called pets", None),
    ],
)
def test_a_card_names_a_data_set_of_the_hub_but_no_folder(name, said, on_the_hub, monkeypatch):
    from fedtalos.app.model_card import model_card
    from fedtalos.app.trained import open_trained

    Path("secret/pets").mkdir(parents=True)
    trained = open_trained(Path("a"), Path(), "last")
    trained.options["dataset"] = name
    card = model_card(trained, "hf", None)
    assert f"| images | {said};" in card.replace("\\", "")
    assert fields(card).get("datasets") == on_the_hub
    assert "secret" not in card


# bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "a"], "predict: expected images after the run"),
        (["predict", "a", "nope.jpg"], "nope.jpg: no such image or folder"),
        (["predict", "b", "photos"], "checkpoint b: no b/last.json or checkpoints/b/last.json"),
        (["predict", "m", "photos"], "holds no model"),
        (["predict", "a", "photos", "--json", "--csv"], "--json and --csv: each is a form"),
        (["predict", "a", "photos", "--top", "0"], "top: input should be greater than or equal to 1"),
        (["predict", "a/last.json", "photos", "--which", "best"], "--which best: a/last.json is one checkpoint"),
        (["explain", "a"], "explain: expected images after the run"),
        (["explain", "a", "photos", "--target", "seven"], "--target seven: the model has no such class"),
        (["export", "a", "--license", "My Own"], "--license 'My Own': expected a short name"),
        (["export", "a", "--folder", "photos"], "photos is there already"),
        (["push", "a", "--hub", "mine"], "--hub mine: expected OWNER/REPO"),
        (["report", "a", "a"], "report: expected different runs, got one of them twice"),
        (["evaluate", "a", "--folder", "nope"], "nope is no folder"),
        (["evaluate", "a", "--folder", "photos", "--split", "val"], "--split val both say which images"),
        (["evaluate", "a", "--folder", "photos", "--eval_limit", "3"], "--eval_limit 3 both say which images"),
        (["evaluate", "a", "--folder", "photos/0"], "photos/0 holds"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, says, capsys):
    before = sorted(Path().rglob("*"))
    assert says in refused(arguments, capsys)
    assert sorted(path for path in Path().rglob("*") if path.name != ".lock") == [
        p for p in before if p.name != ".lock"
    ]
