"""Bad files through the real command line: exit code 2, one sentence that names them, no traceback, nothing written.

material.py makes them. What only the readers of one kind can be asked is tested beside them (test_dataset_loader.py,
test_pretrained.py, test_files.py), any bytes at all in test_fuzz.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from material import case, everything, sentence, spelled

from fedtalos.cli import main
from fedtalos.data import downloads
from fedtalos.data.image_folder import read_image_folder
from fedtalos.notes import noted

ROOT = Path(__file__).parents[2]
PICTURES = "federated --dataset folder --data_dir pictures/"
CIFAR = "federated --dataset cifar100 --data_dir cifar/"
WEIGHTS = "centralized --weights weights/"
MASK = "federated --mask masks/"
HEAD = "federated --head "

unreadable = "is not a readable image"
torn = "neither a whole safetensors file nor a torch state dict"
no_mask = "not a readable fedtalos mask file ("
changed = "not what was written (checksum)"
version = "is of another version"

IMAGES = [
    case(PICTURES + "zero.png", "zero.png/a/zero.png", unreadable, "it is empty", "move it out of"),
    case(PICTURES + "text.png", "text.png/a/text.png", unreadable),
    case(PICTURES + "cut.png", "cut.png/a/cut.png", unreadable),
    case(PICTURES + "head.png", "head.png/a/head.png", unreadable),
    case(PICTURES + "bit.png", "bit.png/a/bit.png", unreadable),
    case(PICTURES + "cut.jpg", "cut.jpg/a/cut.jpg", unreadable),
    case(PICTURES + "cut.webp", "cut.webp/a/cut.webp", unreadable),
    case(PICTURES + "script.png", "script.png/a/script.png", unreadable, "PostScript"),  # which Pillow would run
    case(PICTURES + "bomb.png", "bomb.png/a/bomb.png", unreadable, "900 megapixels, and 256 is the limit of PNG"),
    case(PICTURES + "large.png", "large.png/a/large.png", unreadable),  # it says 100 megapixels, and holds few
    case(PICTURES + "loop", "loop/a/loop.png", unreadable, "a link to nothing", "move it out of"),
    case(PICTURES + "nothing", "nothing/a/nothing.png", unreadable, "a link to nothing"),
    case(PICTURES + "pipe", "pipe/a/pipe.png", unreadable, "no file"),
    case(PICTURES + "hollow", "hollow holds class folders without images"),
    case(PICTURES + "unlike", "test/b/0.png is a test image of class 'b', of which there are no training images"),
]

ARCHIVES = [
    case(CIFAR + "hostile", "hostile/train asks for posix.system", "may be hostile", "replace it by the original"),
    case(CIFAR + "objects", "objects/train", "replace it by the original"),
    case(CIFAR + "cut", "cut/train cannot be read", "replace it by the original"),
    case(CIFAR + "list", "list/train holds no dictionary"),
    case(CIFAR + "memo", "memo/train", "replace it by the original"),
    case(CIFAR + "claims", "claims/train", "replace it by the original"),
    case(CIFAR + "labels", "labels/train holds 'fine_labels' outside 0..1"),
    case(CIFAR + "narrow", "narrow/train holds no uint8 images of 3 x 32 x 32"),
    case(CIFAR + "noise", "noise/cifar-100-python.tar.gz is damaged", "move it away"),
    case(CIFAR + "torn", "torn/cifar-100-python.tar.gz is damaged"),
    case(CIFAR + "bit", "bit/cifar-100-python.tar.gz is damaged", "CRC"),
    case(CIFAR + "climbing", "climbing/cifar-100-python.tar.gz lacks cifar-100-python/meta"),
    case(CIFAR + "link", "link/cifar-100-python.tar.gz lacks cifar-100-python/train"),
    case(CIFAR + "lacking", "lacking/cifar-100-python.tar.gz lacks cifar-100-python/test"),
]

WEIGHT_FILES = [
    *(case(WEIGHTS + f"run.{kind}", f"run.{kind}: {torn}", "fetch it again") for kind in ("pth", "pt", "bin")),
    case(WEIGHTS + "within.pth", "within.pth", torn),
    case(WEIGHTS + "list.pth", "list.pth: expected tensors by name, got a list"),
    case(WEIGHTS + "text.pth", "text.pth", torn),
    case(WEIGHTS + "empty.pth", "empty.pth", torn),
    case(WEIGHTS + "empty.safetensors", "empty.safetensors", torn),
    case(WEIGHTS + "cut.safetensors", "cut.safetensors", torn),
    case(WEIGHTS + "length.safetensors", "length.safetensors", torn),
    case(WEIGHTS + "short.safetensors", "short.safetensors", torn),
    case(WEIGHTS + "words.safetensors", "words.safetensors", torn),
    case(WEIGHTS + "past.safetensors", "past.safetensors", torn),
    case(WEIGHTS + "twice.safetensors", "twice.safetensors", torn),
    case(WEIGHTS + "small.safetensors", "small.safetensors", torn),
    case(WEIGHTS + "large.safetensors", "large.safetensors", torn),
    case(WEIGHTS + "dtype.safetensors", "dtype.safetensors", torn),
    case("centralized --weights noise.safetensors", "noise.safetensors", torn),
    case("centralized --weights masks/m.safetensors", "m.safetensors", "give weights in float32"),
    case("centralized --weights masks/m.head.safetensors", "m.head.safetensors: no cls_token"),
    case(WEIGHTS + "nan.safetensors", "nan.safetensors: norm.bias holds NaN or infinity", "did not diverge"),
    case(WEIGHTS + "infinite.safetensors", "infinite.safetensors: norm.bias holds NaN or infinity"),
    case(WEIGHTS + "integers.safetensors", "integers.safetensors: norm.bias is torch.int64", "float32"),
    case(WEIGHTS + "fp8.safetensors", "fp8.safetensors: norm.bias is torch.float8_e4m3fn", "bfloat16"),
    case(WEIGHTS + "misshapen.safetensors", "1 misshapen (norm.bias (97,) instead of (96,))", "weights none"),
    case(WEIGHTS + "flat.safetensors", "flat.safetensors: no pos_embed of 3 dimensions"),
    case(WEIGHTS + "oblong.safetensors", "oblong.safetensors: expected a position embedding", "square images"),
    case(WEIGHTS + "patchless.safetensors", "patchless.safetensors: no patch_embed.proj.weight of 4 dimensions"),
    case(WEIGHTS + "wide.safetensors", "width 97 and depth 6 are no known size", "give micro 96 and 6"),
    case(WEIGHTS + "bell.safetensors", r"1 unexpected (\x1b[31m"),
    case(WEIGHTS + "convolution.safetensors", "convolution.safetensors: no cls_token of 3 dimensions"),
    case(WEIGHTS + "expanded.pth", "expanded.pth: norm.bias is a view of fewer numbers", "tensor.clone()"),
    case(WEIGHTS + "meta.pth", "meta.pth", "norm.bias"),
    case(WEIGHTS + "sparse.pth", "sparse.pth: norm.bias is torch.float32"),
    case(WEIGHTS + "stated.safetensors", "stated.json: expected a JSON object", "normalisation imagenet or half"),
]

MASKS = [
    case("federated --mask noise.safetensors", "noise.safetensors", no_mask),
    case("federated --mask weights/whole.safetensors", "whole.safetensors", no_mask),
    case("mask show weights/whole.safetensors", "whole.safetensors", no_mask),
    case("plot --masks weights/whole.safetensors", "whole.safetensors", no_mask),
    case(MASK + "m.head.safetensors", "m.head.safetensors", no_mask),
    case(MASK + "empty.safetensors", "empty.safetensors", no_mask),
    case(MASK + "cut.safetensors", "cut.safetensors", changed, "make it anew with `fedtalos editing`"),
    case(MASK + "bit.safetensors", "bit.safetensors", changed),
    case(MASK + "unsealed.safetensors", "unsealed.safetensors", changed),
    case(MASK + "older.safetensors", "older.safetensors: format 2, this version reads 3; make it anew"),
    case("mask show masks/older.safetensors", "older.safetensors: format 2, this version reads 3"),
    *(
        case(MASK + f"{name}.safetensors", f"{name}.safetensors: not a readable fedtalos mask file", why, "anew")
        for name, why in {
            "count": "other bits",
            "none": "other bits",
            "false": "it says 999999 entries are eligible, which are 670464",
            "more": "facts.tomorrow: unexpected",
            "rule": "facts.eligible_in: input should be 'blocks'",
            "bell": r"facts.data: expected other text, got '\x1b[31m'",
            "large": "shapes.blocks.0.norm1.weight.0: input should be less than",
            "shape": "shapes.blocks.0.norm1.weight.0: input should be greater than",
            "words": "shapes.blocks.0.norm1.weight: input should be a valid array",
            "name": "other tensors",
            "lacking": "make it anew",
            "dtype": "a shape that is not that of the bits",
        }.items()
    ),
    case("mask show masks/block.safetensors", "block.safetensors: not a readable fedtalos mask file (other tensors)"),
]

HEADS = [
    case(HEAD + "noise.safetensors", "noise.safetensors: not a head file"),
    case(HEAD + "masks/m.safetensors", "m.safetensors: not a head file", "beside its mask"),
    case(HEAD + "heads/bit.safetensors", "bit.safetensors", changed, "make it anew"),
    case(HEAD + "heads/cut.safetensors", "cut.safetensors: not a head file"),
    case(HEAD + "heads/unsealed.safetensors", "unsealed.safetensors", changed, version.removeprefix("is ")),
    case(HEAD + "heads/weight.safetensors", "weight.safetensors: not a head file"),
    case(HEAD + "heads/nan.safetensors", "nan.safetensors: holds other than finite numbers", "did not diverge"),
    case(HEAD + "heads/whole.safetensors", "whole.safetensors: holds other than finite numbers"),
]

CHECKPOINTS = [
    case("evaluate truncated", "truncated/last.json", "is not what was saved (checksum)", "give another"),
    case("evaluate flipped", "flipped/last.json", "is not what was saved (checksum)"),
    case("evaluate digit", "digit/last.json: not what was saved (checksum)"),
    case("evaluate unsealed", "unsealed/last.json: not what was saved (checksum)"),
    case("evaluate foreign", "foreign/last.json", "not a fedtalos checkpoint"),
    case("evaluate torn", "torn/last.json: broken"),
    case("evaluate nested", "nested/last.json: broken"),
    case("evaluate older", "older/last.json: format 1, this version reads 2; make it anew"),
    case("evaluate newer", "newer/last.json: format 3, this version reads 2"),
    case("evaluate lost", "lost/last.json: its", "cannot be read (No such file"),
    case("evaluate bare", "bare/last.json", version),
    case("evaluate later", "later/last.json", "an_option_of_tomorrow"),
    case("evaluate checkpoints/noise.json", "noise.json: broken"),
    case("centralized --weights checkpoints/flipped/last.json", "flipped", "is not what was saved (checksum)"),
    case("centralized --weights checkpoints/foreign/last.json", "foreign", "not a fedtalos checkpoint"),
    case("editing --weights auto --checkpoint truncated", "truncated/last.json", "is not what was saved (checksum)"),
    case("editing --weights auto --checkpoint foreign", "foreign/last.json", "not a fedtalos checkpoint"),
    case("centralized --resume --run_name flipped", "flipped/last.json", "is not what was saved (checksum)"),
    case("centralized --resume --run_name digit", "digit/last.json: not what was saved (checksum)"),
    case("centralized --resume --run_name older", "older/last.json: format 1, this version reads 2"),
    case("centralized --resume --run_name bare", "bare/last.json", version, "start a run of another name"),
    case("centralized --resume --run_name later", "later/last.json", version),
    case("centralized --resume --run_name lost", "lost/last.json: its", "cannot be read (No such file"),
]

RESULTS = [
    case("centralized --resume --run_name garbled", "results/garbled/config.yaml: expected 'option: value' lines"),
    case("centralized --resume --run_name tomorrow", "tomorrow/config.yaml: unknown option 'an_option_of_tomorrow'"),
    case("centralized --resume --run_name edited", "edited/config.yaml: weight_decay was 0.01", "put that back"),
    case("centralized --resume --run_name unmade", "--resume: the data of unmade changed since it started"),
    case("centralized --resume --run_name noise", "noise/metrics.csv: not a readable CSV file", "another name"),
    case("centralized --resume --run_name columns", "columns/metrics.csv: expected the columns", "another name"),
    case("plot empty", "results/empty/metrics.csv", "got an empty file"),
    case("plot noise", "results/noise/metrics.csv: not a readable CSV file"),
    case("plot columns", "results/columns/metrics.csv: expected the columns", "make the run anew"),
    case("plot letters", "results/letters/metrics.csv, line 2: expected numbers"),
    case("plot beyond", "results/beyond/metrics.csv, line 2: expected numbers"),
    case("plot unmeasured", "results/unmeasured/metrics.csv: holds no accuracy yet"),
    case("plot packed", "results/packed/split.npz: expected client and label", "make the run anew"),
    case("plot pickled", "results/pickled/split.npz: expected client and label"),
    case("plot report", "results/report/report.csv: expected the columns", "name a run of `fedtalos editing`"),
    case("plot iterations", "results/iterations/report.csv, line 2: expected numbers within their limits (entries: "),
]


@pytest.fixture(autouse=True)
def here(material, monkeypatch):
    monkeypatch.chdir(material)


def check(command, said, capsys):
    says = sentence(spelled(command), capsys)
    assert [words for words in said if words not in says] == [], says
    assert not Path("pwned").exists()


@pytest.mark.parametrize(("command", "said"), IMAGES)
def test_image_folders(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(
    ("folder", "what", "says"),
    [
        ("gif.png", "images", "a 2, b 1"),  # by content, whatever the ending
        ("folder", "images", "a 1, b 1"),
        ("parent", "links left out", "lead to folders that are read already"),
        ("moving.png", "animated images", "the first one counts"),
        ("moving.webp", "animated images", "the first one counts"),
    ],
)
def test_odd_image_folders_are_read_and_said(folder, what, says, tmp_path):
    noted()
    before = everything()
    assert read_image_folder(Path("pictures", folder), 8, cache_dir=tmp_path).classes == ("a", "b")
    assert says in noted()[what]
    assert everything() == before


@pytest.mark.parametrize(("command", "said"), ARCHIVES)
def test_cifar_files_and_archives(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(("command", "said"), WEIGHT_FILES)
def test_weights(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(("command", "said"), MASKS)
def test_masks(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(("command", "said"), HEADS)
def test_heads(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(("command", "said"), CHECKPOINTS)
def test_checkpoints(command, said, capsys):
    check(command, said, capsys)


@pytest.mark.parametrize(("command", "said"), RESULTS)
def test_results(command, said, capsys):
    check(command, said, capsys)


def test_an_archive_that_unpacks_to_far_too_much(capsys, monkeypatch):
    monkeypatch.setattr(downloads, "LARGEST", 2**20)
    check(CIFAR + "zeros", ["zeros/cifar-100-python.tar.gz holds more than 1048576 bytes", "replace it"], capsys)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision_are_taken(dtype, tmp_path):
    main([*spelled(WEIGHTS + f"{dtype}.safetensors"), "--output_dir", str(tmp_path), "--run_name", "half"])


def test_a_checkpoint_names_no_file_of_another_folder():
    main(spelled("evaluate climbing"))  # it reads the one beside it


@pytest.mark.parametrize("command", ["evaluate digit", MASK + "large.safetensors"])
def test_as_a_process(command):
    before = everything()
    arguments = [sys.executable, str(ROOT / "main.py"), *spelled(command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert everything() == before
