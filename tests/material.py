"""Files as strangers and bad disks leave them, around one small finished run; and what a refusal of them looks like."""

import gzip
import io
import json
import os
import pickle
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load as load_numpy
from safetensors.numpy import save as save_numpy
from safetensors.torch import load_file, save_file

from fedtalos.app.figures import draw as plots
from fedtalos.cli import main
from fedtalos.files import UNSEALED, sealed
from fedtalos.training.editing.eligible import eligible_masks
from fedtalos.training.editing.mask_file import read_mask_file, write_mask_file

DIGITS = "--dataset digits --model_size micro --weights none --image_size 8 --patch_size 2 --device cpu "
SMALL = DIGITS + "--train_limit 100 --eval_limit 20 "
RUNS = {
    "centralized": SMALL + "--num_epochs 1 --optimizer sgd --momentum 0",
    "federated": SMALL + "--num_clients 4 --num_rounds 1",
    "editing": SMALL + "--calibration_fraction 0.05 --num_iterations 1",
}
NOISE = np.random.default_rng(0).bytes(300)
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)
YAML = {
    "unknown.yaml": "num_clents: 3",
    "group.yaml": "train: {learning_rate: 3}",
    "list.yaml": "- num_clients",
    "broken.yaml": "seed: 1\nnum_clients: [1, 2",
    "tab.yaml": "seed: 1\n\tnum_clients: 2",
    "number.yaml": "3: 4",
    "date.yaml": "run_name: 2020-13-45",
    "null.yaml": "num_clients: null",
    "several.yaml": "num_clients: [1, 2]",
    "mapping.yaml": "learning_rate: {peak: 1}",
    "word.yaml": "num_clients: many",
    "half.yaml": "num_clients: 2.5",
    "true.yaml": "num_clients: true",
    "device.yaml": "device: tpu",
    "nobody.yaml": "client_fraction: 0",
    "sparse.yaml": "target_sparsity: 1.0",
    "still.yaml": "learning_rate: 0",
    "twice.yaml": "seed: 1\nseed: 2",
    "nan.yaml": "learning_rate: .nan",
    "warm.yaml": "warmup: 150",
    "noise.yaml": NOISE,
    "latin.yaml": "run_name: caf\xe9".encode("latin1"),
    "code.yaml": "seed: !!python/object/apply:os.system ['touch pwned']",
    "tag.yaml": "seed: !!bool maybe",
    "laughs.yaml": LAUGHS + "num_clients: *a9",
    "merges.yaml": LAUGHS.replace("[x, x, x, x, x, x, x, x, x, x]", "{seed: 1}").replace(": [", ": {<<: ["),
    "itself.yaml": "num_clients: &a [*a]",
    "deep.yaml": "- " * 2_000,
    "long.yaml": "# " + 200_000 * "x",
    "nul.yaml": 'data_dir: "a\\0b"',
    "bell.yaml": 'run_name: "a\\e[31mb"',
    "huge.yaml": "num_clients: 0x" + 5_000 * "F",
    "text.yaml": "num_clients: '99999999999999999999'",
    "configs/experiment_configs.yaml": "quick: {command: federated, num_rounds: 1}\n"
    "typo: {command: federated, num_ronds: 1}\nempty: {command: federated, num_clients: 0}\n"
    "sharp: {command: editing, target_sparsity: 1.5}\nnumber: 3\nodd: {command: federated, 3: 4}\n"
    "nobody: {num_rounds: 1}\nboth: {command: [federated, editing]}\nmany: {grid: []}\n",
}


class Hostile:
    """What is unpickled by an ordinary unpickler runs this."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def write(path: str, content: bytes | str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def flip(content: bytes, at: int = -9) -> bytes:
    """One bit is another."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def make(folder: Path) -> None:
    """Fill the folder: a finished run `done`, masks `m` and `tiny`, and every kind of broken file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for drawn in ("plot_run", "plot_masks", "plot_iterations"):
            patched.setattr(plots, drawn, lambda *_: [])
        main(spelled("centralized --run_name done"))
        main(spelled("editing --run_name m"))
        main(spelled("editing --run_name tiny --model_size tiny --criterion random --head random"))
        shutil.rmtree("checkpoints/tiny")
        for name, content in YAML.items():
            write(name, content)
        write("file.txt", "x")
        write("noise.safetensors", NOISE)
        Path("void").mkdir()
        break_masks_and_heads()
        break_weights()
        break_checkpoints_and_results()
        break_data()


def break_masks_and_heads() -> None:
    """Beside the mask m: one of its frozen entries, one for other weights, and broken ones under broken/."""
    path = Path("masks/m.safetensors")
    mask, facts = read_mask_file(path)
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, "blocks")
    rest = {name: eligible[name] & ~tensor for name, tensor in mask.items()}
    active = sum(int(tensor.sum()) for tensor in rest.values())
    write_mask_file(Path("masks/rest.safetensors"), rest, replace(facts, active=active))
    write_mask_file(Path("masks/foreign.safetensors"), mask, replace(facts, weights="others"))
    content, head = path.read_bytes(), Path("masks/m.head.safetensors").read_bytes()
    first = "blocks.0.norm1.weight"
    files = {
        "masks/kept.safetensors": content,
        "masks/empty.safetensors": b"",
        "masks/cut.safetensors": content[:-100],
        "masks/bit.safetensors": flip(content),
        "masks/older.safetensors": changed_mask(content, lambda h, _: h["facts"].update(format=2)),
        "masks/unsealed.safetensors": changed_mask(content, lambda h, _: h.pop("seal")),
        "masks/count.safetensors": changed_mask(content, lambda h, _: h["facts"].update(active=1)),
        "masks/none.safetensors": changed_mask(content, lambda h, _: h["facts"].update(eligible=0)),
        "masks/false.safetensors": changed_mask(content, lambda h, _: h["facts"].update(eligible=999_999)),
        "masks/more.safetensors": changed_mask(content, lambda h, _: h["facts"].update(tomorrow=1)),
        "masks/rule.safetensors": changed_mask(content, lambda h, _: h["facts"].update(eligible_in="head")),
        "masks/bell.safetensors": changed_mask(content, lambda h, _: h["facts"].update(data="\x1b[31m")),
        "masks/large.safetensors": changed_mask(content, lambda h, _: h["shapes"].update({first: [10**12]})),
        "masks/shape.safetensors": changed_mask(content, lambda h, _: h["shapes"].update({first: [-96]})),
        "masks/words.safetensors": changed_mask(content, lambda h, _: h["shapes"].update({first: "all"})),
        "masks/name.safetensors": changed_mask(content, lambda h, _: h["shapes"].update({"head.weight": [1]})),
        "masks/block.safetensors": changed_mask(content, renamed(first, "blocks.x.norm1.weight")),
        "masks/lacking.safetensors": changed_mask(content, lambda _, bits: bits.pop(first)),
        "masks/dtype.safetensors": changed_mask(content, lambda _, b: b.update({first: b[first].view(np.int8)})),
        "heads/bit.safetensors": flip(head),
        "heads/cut.safetensors": head[:-100],
        "heads/unsealed.safetensors": head.replace(b"sha256:", b"sha512:"),
        "heads/weight.safetensors": sealed(save_numpy({"head.weight": np.ones((10, 96), "f4")}, {"seal": UNSEALED})),
        "heads/nan.safetensors": a_head(np.nan),
        "heads/whole.safetensors": a_head(1, "i4"),
    }
    for name, broken in files.items():
        write(name, broken)


def changed_mask(content: bytes, change: Callable[[dict, dict], Any]) -> bytes:
    """A mask file of another header or other bits, sealed anew, as by someone who means it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedtalos_mask"]) | {"seal": UNSEALED}
    bits = load_numpy(content)
    change(header, bits)
    return sealed(save_numpy(bits, {"fedtalos_mask": json.dumps(header)}))


def renamed(old: str, new: str) -> Callable[[dict, dict], None]:
    def change(header: dict, bits: dict) -> None:
        header["shapes"][new], bits[new] = header["shapes"].pop(old), bits.pop(old)

    return change


def a_head(value: float, dtype: str = "f4") -> bytes:
    tensors = {"head.weight": np.full((10, 96), value, dtype), "head.bias": np.full(10, value, dtype)}
    return sealed(save_numpy(tensors, {"seal": UNSEALED}))


def break_weights() -> None:
    """weights/whole.safetensors is a micro ViT, the others are not."""
    path = Path("weights/whole.safetensors")
    path.parent.mkdir()
    shutil.copy(next(Path("checkpoints/done").glob("last-*.safetensors")), path)
    content, state = path.read_bytes(), load_file(path)
    for name in ("run.pth", "run.pt", "run.bin"):
        write(f"weights/{name}", pickle.dumps(Hostile(), 2))
    torch.save({"cls_token": Hostile()}, "weights/within.pth")
    files = {
        "empty.safetensors": b"",
        "cut.safetensors": content[:-1000],
        "length.safetensors": (2**62).to_bytes(8, "little") + content[8:],
        "short.safetensors": (40).to_bytes(8, "little") + content[8:],
        "words.safetensors": safetensors_of(b"[1, 2]", b""),
        "past.safetensors": safetensors_of({"a": tensor_entry([100], 0, 400)}, bytes(4)),
        "twice.safetensors": safetensors_of({n: tensor_entry([1], 0, 4) for n in "ab"}, bytes(4)),
        "small.safetensors": safetensors_of({"a": tensor_entry([2], 0, 4)}, bytes(4)),
        "large.safetensors": safetensors_of({"a": tensor_entry([2**40, 2**40], 0, 4)}, bytes(4)),
        "dtype.safetensors": safetensors_of({"a": {**tensor_entry([1], 0, 4), "dtype": "Z9"}}, bytes(4)),
        "empty.pth": b"",
        "text.pth": b"weights",
    }
    for name, broken in files.items():
        write(f"weights/{name}", broken)
    norm = "norm.bias"
    changes = {
        "nan": {norm: torch.full((96,), torch.nan)},
        "infinite": {norm: torch.full((96,), torch.inf)},
        "integers": {norm: torch.ones(96, dtype=torch.int64)},
        "fp8": {norm: torch.ones(96).to(torch.float8_e4m3fn)},
        "misshapen": {norm: torch.ones(97)},
        "flat": {"pos_embed": torch.ones(17, 96)},
        "oblong": {"pos_embed": torch.ones(1, 13, 96)},
        "patchless": {"patch_embed.proj.weight": torch.ones(96, 3, 2, 0)},
        "wide": {"cls_token": torch.ones(1, 1, 97)},
        "bell": {"\x1b[31m\n": torch.ones(1)},
    }
    for name, tensors in changes.items():
        save_file(state | tensors, f"weights/{name}.safetensors")
    save_file({"conv1.weight": torch.ones(3, 3)}, "weights/convolution.safetensors")
    torch.save(state | {norm: torch.ones(1).expand(10**12)}, "weights/expanded.pth")
    torch.save(state | {norm: torch.ones(96, device="meta")}, "weights/meta.pth")
    torch.save(state | {norm: torch.ones(96).to_sparse()}, "weights/sparse.pth")
    torch.save([1, 2], "weights/list.pth")
    for dtype in ("float16", "bfloat16"):
        save_file({name: t.to(getattr(torch, dtype)) for name, t in state.items()}, f"weights/{dtype}.safetensors")
    shutil.copy(path, "weights/stated.safetensors")
    write("weights/stated.json", '{"mean": [0.5], "std": 1}')


def tensor_entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def safetensors_of(header: dict | bytes, data: bytes) -> bytes:
    """What a safetensors file is made of, whatever it says of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def break_checkpoints_and_results() -> None:
    saved = Path("checkpoints/done/last.json").read_bytes()
    tensors = next(Path("checkpoints/done").glob("last-*.safetensors")).read_bytes()
    digit = saved.index(b'"images": ') + 11
    a_copy("stopped")
    a_copy("flipped", tensors=flip(tensors))
    a_copy("truncated", tensors=tensors[:-1000])
    a_copy("digit", header=flip(saved, digit))
    a_copy("unsealed", header=saved.replace(b"sha256:", b"sha512:"))
    a_copy("foreign", header=b'{"hello": 1}')
    a_copy("torn", header=saved[:300])
    a_copy("nested", header=b"[" * 100_000)
    a_copy("older", format=1)
    a_copy("newer", format=3)
    a_copy("bare", options=None, progress=None)
    a_copy("later", options={"run_name": "later", "an_option_of_tomorrow": 1})
    a_copy("lost", file="elsewhere.safetensors")
    write("checkpoints/noise.json", NOISE)
    a_copy("climbing", file="../done/" + json.loads(saved)["file"])
    shutil.copytree("checkpoints/done", "checkpoints/orphan")
    config, metrics = (Path("results/done", name).read_text() for name in ("config.yaml", "metrics.csv"))
    configs = {
        "edited": config.replace("weight_decay: 0.01", "weight_decay: 0.02"),
        "tomorrow": config + "an_option_of_tomorrow: 1\n",
        "garbled": "- a list",
        "unmade": config[: config.index("made_by:")] + "made_by: me\n",
    }
    tables = {
        "empty": b"",
        "noise": NOISE,
        "columns": metrics.replace("bytes_down,", "").replace(",0,", ",", 1),
        "letters": metrics.replace("0.", "O."),
        "beyond": metrics.replace("\n0,", f"\n{10**400},"),
        "unmeasured": metrics.splitlines()[0] + "\n",
    }
    for name, text in configs.items():
        a_copy(name)
        write(f"results/{name}/config.yaml", text)
    for name, table in tables.items():
        a_copy(name)
        write(f"results/{name}/metrics.csv", table)
    a_copy("packed")
    arrays = {"client": np.zeros(9, np.uint8), "label": np.zeros(9, np.uint8), "classes": np.array(["a"])}
    np.savez_compressed("results/packed/split.npz", **arrays)
    a_copy("pickled")
    np.savez("results/pickled/split.npz", **arrays | {"client": np.array([Hostile()], dtype=object)})
    a_copy("report")
    write("results/report/report.csv", "round,kind\n1,q\n")
    a_copy("iterations")
    write("results/iterations/report.csv", "iteration,block,kind,active,entries\n1,0,q,1,0\n2,0,q,1,0\n")
    for name in ("report", "iterations"):
        shutil.copy("masks/m.safetensors", f"masks/{name}.safetensors")


def a_copy(name: str, tensors: bytes | None = None, header: bytes | None = None, **facts: object) -> None:
    """Of the run `done`, unfinished: with other tensors or header, or facts (None: left out), then sealed anew."""
    source = Path("checkpoints/done")
    saved = json.loads((source / "last.json").read_bytes())
    changed = {key: value for key, value in {**saved, **facts, "seal": UNSEALED}.items() if value is not None}
    write(f"checkpoints/{name}/last.json", sealed(json.dumps(changed).encode()) if header is None else header)
    if tensors is None:
        os.link(source / saved["file"], f"checkpoints/{name}/{saved['file']}")  # it is large
    else:
        write(f"checkpoints/{name}/{saved['file']}", tensors)
    for file in ("config.yaml", "metrics.csv"):
        write(f"results/{name}/{file}", Path("results/done", file).read_bytes())


def break_data() -> None:
    """Image folders of one bad image each, and CIFAR files and archives."""
    images = {
        "zero.png": b"",
        "text.png": b"not an image",
        "cut.png": picture()[:-40],
        "head.png": picture()[:40],
        "bit.png": flip(picture(), len(picture()) // 2),
        "cut.jpg": picture("JPEG")[:-100],
        "cut.webp": picture("WEBP")[:-100],
        "gif.png": picture("GIF"),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(pwned) (w) file\n",
        "moving.png": picture("PNG", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
        "moving.webp": picture("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]),
        "bomb.png": resized_header(picture(), 30_000, 30_000),
        "large.png": resized_header(picture(), 10_000, 10_000),
    }
    for name, content in images.items():
        an_image_folder(f"pictures/{name}")
        write(f"pictures/{name}/a/{name}", content)
    for name in ("loop", "nothing", "folder", "pipe", "parent"):
        an_image_folder(f"pictures/{name}")
    Path("pictures/loop/a/loop.png").symlink_to("loop.png")
    Path("pictures/nothing/a/nothing.png").symlink_to("nowhere.png")
    Path("pictures/folder/a/folder.png").mkdir()
    os.mkfifo("pictures/pipe/a/pipe.png")
    Path("pictures/parent/up").symlink_to("..", target_is_directory=True)
    Path("pictures/hollow/cat").mkdir(parents=True)
    for folder in ("train/a", "test/b"):
        write(f"pictures/unlike/{folder}/0.png", picture())
    an_image_folder("images", 12)
    break_cifar()


def an_image_folder(name: str, images: int = 1) -> None:
    """Two classes of so many images."""
    for label in ("a", "b"):
        for number in range(images):
            write(f"{name}/{label}/{number}.png", picture())


def picture(kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def resized_header(png: bytes, width: int, height: int) -> bytes:
    """The PNG, as if it were as large as that."""

    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def break_cifar() -> None:
    files = {
        "meta": pickle.dumps({b"fine_label_names": [b"a", b"b"]}, 2),
        "train": pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"fine_labels": [0, 1] * 10}, 2),
    }
    files["test"] = files["train"]
    trains = {
        "hostile": pickle.dumps(Hostile()),
        "cut": files["train"][:-2000],
        "list": pickle.dumps([1, 2]),
        "memo": b"\x80\x02]r\xff\xff\xff\xff.",
        "claims": b"\x80\x02cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        "labels": pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 7]}, 2),
        "narrow": pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"fine_labels": [0, 1]}, 2),
        "objects": pickle.dumps({b"data": np.array([Hostile()]), b"fine_labels": [0]}, 2),
    }
    for name, train in trains.items():
        for file, content in {**files, "train": train}.items():
            write(f"cifar/{name}/{file}", content)
    archive = an_archive(files)
    archives = {
        "noise": NOISE,
        "torn": archive[: len(archive) // 2],
        "bit": flip(archive, -6),
        "climbing": an_archive(files, folder="../cifar-100-python"),
        "link": an_archive({**files, "train": None}),
        "lacking": an_archive({"meta": files["meta"]}),
        "zeros": gzip.compress(bytes(2**21)),
    }
    for name, content in archives.items():
        write(f"cifar/{name}/cifar-100-python.tar.gz", content)


def an_archive(files: dict[str, bytes | None], folder: str = "cifar-100-python") -> bytes:
    """None: a link to a file of this machine."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            if file is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(file)
            tar.addfile(member, None if file is None else io.BytesIO(file))
    return content.getvalue()


# what a refusal looks like


def spelled(command: str) -> list[str]:
    """The words of a command, small options after its name; what it says itself comes later and wins."""
    words = shlex.split(command)
    return [*words[:1], *shlex.split(RUNS.get("".join(words[:1]), "")), *words[1:]]


def case(command: str, *said: str):
    return pytest.param(command, said, id=command or "nothing")


def everything() -> dict[str, tuple[int, int] | None]:
    """Every path under the working folder, with size and time of the files; locks end with their process."""
    found: dict[str, tuple[int, int] | None] = {}
    for folder, _, names in os.walk("."):
        found[folder] = None
        for name in names:
            if name != ".lock":
                stat = os.lstat(f"{folder}/{name}")
                found[f"{folder}/{name}"] = (stat.st_size, stat.st_mtime_ns)
    return found


def refused(arguments: list[str], capsys) -> str:
    """What a refusal says; it has exit code 2, no traceback, and writes nothing."""
    before = everything()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    says = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in says
    assert "pydantic" not in says
    assert everything() == before
    return says


def sentence(arguments: list[str], capsys) -> str:
    """One line that begins with the program's name, and that a terminal shows as it is."""
    says = refused(arguments, capsys).splitlines()
    assert len(says) == 1, says
    assert says[0].startswith("fedtalos: ")
    assert says[0].isprintable()
    assert len(says[0]) < 700
    return says[0]
