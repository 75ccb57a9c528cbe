"""Bad commands, options, presets and names: exit code 2, one sentence that names it, no traceback, nothing written.

What is wrong with files is in test_bad_files.py.
"""

import importlib.util
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from limits import refused_if_at_all
from material import case, everything, refused, sentence, spelled

from fedtalos.app.config import files as config_files
from fedtalos.app.config import help as help_pages
from fedtalos.app.config.help import every_option, is_positional, option_names, tools_of
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.config.tools import FAMILIES
from fedtalos.cli import COMMANDS, parse
from fedtalos.data import downloads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(material, monkeypatch):
    monkeypatch.chdir(material)  # nothing is written there, which every test sees to


SENTENCES = [
    # no command, or an unknown one
    case("", "expected a command", "centralized, federated, continual, editing"),
    case("--seed 1", "expected a command before --seed", "centralized, federated, continual, editing"),
    case("fedrated", "'fedrated'", "did you mean 'federated'"),
    case("fedrated --seed 1", "'fedrated'", "did you mean 'federated'"),
    case("mask", "expected a mask command", "make, show, compare, combine"),
    case("mask --seed 1", "expected a mask command before --seed", "make, show, compare, combine"),
    case("mask random masks/m.safetensors --name x", "no mask command 'random'", "make, show, compare, combine"),
    # unknown flags
    case("federated --num_clents 3", "--num_clents", "did you mean --num_clients?"),
    case("federated --learning-rte=1", "--learning-rte;", "did you mean --learning_rate?"),
    case("federated --lr 1e-3", "--lr", "did you mean --learning_rate?"),
    case("federated --target_sparsity 0.5", "--target_sparsity", "it is an option of editing"),
    case("editing --batch_size 5", "--batch_size", "it is an option of centralized and federated"),
    case("federated --xyzzy", "--xyzzy", "fedtalos federated --help_all"),
    case("plot --nam x", "--nam", "did you mean --name?"),
    case("plot --no_name", "--no_name", "did you mean --name?"),
    case("mask show masks/m.safetensors --ouput_dir x", "mask show", "--ouput_dir", "did you mean --output_dir?"),
    case("editing --merge union", "--merge"),
    case("editing --personal_masks", "--personal_masks"),
    # words and values that nothing takes
    case("federated extra", "nothing takes the word 'extra'", "fedtalos federated --help"),
    case("federated num_clients 3", "nothing takes the word 'num_clients'", "did you mean --num_clients?"),
    case("federated -seed 3", "no option -seed", "did you mean --seed?"),
    case("federated --freeze_head true", "--freeze_head: expected no value, got 'true'", "--no_freeze_head is no"),
    case("federated --no_freeze_head=1", "--no_freeze_head: expected no value, got '1'"),
    case("federated --num_clients", "--num_clients: expected a value after it (N), got nothing"),
    case("federated --device --seed 1", "--device: expected a value after it (auto, mps, cuda, cpu), got nothing"),
    case("federated --leave_out", "--leave_out: expected a value after it (N [N ...]), got nothing"),
    case("federated --leave_out 1 x", "--leave_out: input should be a valid integer", "got 'x'"),
    case("federated --num_clients many", "--num_clients: input should be a valid integer", "got 'many'"),
    case("federated --attack foo", "--attack: input should be 'none', 'sign_flip', 'scaled' or 'nan', got 'foo'"),
    case("federated --learning_rate much", "--learning_rate: input should be a valid number", "got 'much'"),
    case("federated --seed=", "--seed: input should be a valid integer", "got ''"),
    case("federated --device tpu", "--device: input should be 'auto', 'mps', 'cuda' or 'cpu', got 'tpu'"),
    case("federated --device cudda", "--device", "got 'cudda'; did you mean 'cuda'?"),
    case("federated --merge_alpha aute", "--merge_alpha", "got 'aute'; did you mean 'auto'?"),
    case("federated --dataset digit", "--dataset", "'digit'", "expected one of cifar100"),
    case("editing --eligible head", "--eligible: input should be 'blocks'", "got 'head'"),
    case("editing --granularity column", "--granularity: input should be 'entry'", "got 'column'"),
    case("editing --criterion random_", "--criterion", "got 'random_'; did you mean 'random'?"),
    case("federated --config", "--config: expected a value after it (FILE), got nothing"),
    case("federated --preset", "--preset: expected a value after it (NAME), got nothing"),
    case("federated --config --seed 1", "--config: expected a value after it"),
    case("evaluate", "evaluate: expected RUN|FILE", "fedtalos evaluate --help"),
    case("evaluate done --split all", "--split", "got 'all'"),
    case("evaluate done twice", "nothing takes the word 'twice'"),
    case("mask compare" + " m" * 101, "masks: tuple should have at most 100 items"),
    case("mask show", "mask show: expected FILE", "fedtalos mask show --help"),
    case("mask combine a b", "mask combine: expected --name NAME", "fedtalos mask combine --help"),
    case("mask combine a b --name x --rule most", "--rule", "got 'most'"),
    case("fleet node here --client 0 --dataset digits --admit trane", "--admit", "got 'trane'; did you mean 'train'?"),
    # config files
    case("federated --config unknown.yaml", "unknown.yaml", "'num_clents'", "did you mean 'num_clients'"),
    case("federated --config group.yaml", "group.yaml", "unknown option 'train'"),
    case("federated --config list.yaml", "list.yaml", "expected 'option: value' lines, got list"),
    case("federated --config file.txt", "file.txt", "expected 'option: value' lines, got str"),
    case("federated --config broken.yaml", "broken.yaml", "not valid YAML"),
    case("federated --config broken.yaml", "line 2"),
    case("federated --config number.yaml", "number.yaml", "3"),
    case("federated --config date.yaml", "date.yaml", "not valid YAML"),
    case("federated --config noise.yaml", "noise.yaml", "not valid YAML"),
    case("federated --config nowhere.yaml", "nowhere.yaml", "give an existing YAML file"),
    case("federated --config images", "images", "Is a directory"),
    case("federated --config null.yaml", "null.yaml: num_clients", "integer, got None"),
    case("federated --config several.yaml", "several.yaml: num_clients", "integer, got [1, 2]"),
    case("federated --config mapping.yaml", "mapping.yaml: learning_rate", "number, got {'peak': 1}"),
    case("federated --config word.yaml", "word.yaml: num_clients", "got 'many'"),
    case("federated --config half.yaml", "half.yaml: num_clients", "got 2.5"),
    case("federated --config true.yaml", "true.yaml: num_clients"),
    case("federated --config device.yaml", "device.yaml: device", "'cuda' or 'cpu', got 'tpu'"),
    case("federated --config nobody.yaml", "nobody.yaml: client_fraction", "greater than 0, got 0"),
    case("federated --config still.yaml", "still.yaml: learning_rate", "greater than 0, got 0"),
    case("editing --config sparse.yaml", "sparse.yaml: target_sparsity", "less than 1, got 1.0"),
    case("federated --config warm.yaml", "--warmup 150: must be below the"),
    case("federated --config tab.yaml", "tab.yaml, line 2: not valid YAML", "mend it"),
    case("federated --config latin.yaml", "latin.yaml: not valid YAML", "utf-8"),
    case("federated --config code.yaml", "code.yaml, line 1: not valid YAML", "os.system"),
    case("federated --config tag.yaml", "tag.yaml: not valid YAML", "maybe"),
    case("federated --config laughs.yaml", "laughs.yaml: not valid YAML", "stands for more than 100000 values"),
    case("federated --config merges.yaml", "merges.yaml: not valid YAML", "stands for more than 100000 values"),
    case("federated --config itself.yaml", "itself.yaml: not valid YAML", "stands for more than 100000 values"),
    case("federated --config deep.yaml", "deep.yaml: not valid YAML", "Recursion"),
    case("federated --config long.yaml", "long.yaml: holds 200002 bytes, of which 100000 are the limit"),
    case("federated --config nul.yaml", "nul.yaml: data_dir: expected text without NUL characters"),
    case("federated --config bell.yaml", "--run_name 'a\\x1b[31mb': expected a plain folder name"),
    case("federated --config huge.yaml", "huge.yaml: num_clients: expected a number below 2**63, got a huge int"),
    case(
        "federated --config text.yaml",
        "text.yaml: num_clients: expected a number below 2**63, got 99999999999999999999",
    ),
    case("federated --config twice.yaml", "twice.yaml, line 2: not valid YAML ('seed' is said twice)"),
    case("federated --config nan.yaml", "nan.yaml: learning_rate", "finite number, got nan"),
    # presets
    case("federated --preset quik", "'quik'", "did you mean 'quick'"),
    case("federated --preset zzz", "'zzz'", "it has quick, typo"),
    case("editing --preset quick", "'quick' is for `federated`, not for `editing`"),
    case("federated --preset typo", "'typo'", "'num_ronds'", "did you mean 'num_rounds'"),
    case("federated --preset empty", "'empty': num_clients", "got 0"),
    case("editing --preset sharp", "'sharp': target_sparsity", "less than 1, got 1.5"),
    case("federated --preset number", "'number'"),
    case("federated --preset odd", "'odd'", "3"),
    case("federated --preset nobody", "'nobody'", "command"),
    case("federated --preset both", "'both'", "expected command", "got ['federated', 'editing']"),
    case("federated --preset many", "'many' is a grid of many runs", "fedtalos sweep many"),
    case("sweep nowhere", "grid: no 'nowhere'"),
    case("sweep quick", "'quick' is a preset", "fedtalos federated --preset quick"),
    case("sweep many", "'many'", "grid", "at least 1 item"),
    # flags out of range
    case("editing --target_sparsity -0.1", "target_sparsity", "-0.1"),
    case("editing --target_sparsity 1.0", "target_sparsity", "1.0"),
    case("editing --target_sparsity 1.5", "target_sparsity", "1.5"),
    case("editing --num_iterations 0", "num_iterations", "0"),
    case("editing --soft_zero 0", "soft_zero", "0"),
    case("federated --client_fraction 0", "client_fraction", "0"),
    case("federated --num_clients 0", "num_clients", "0"),
    case("federated --learning_rate 0", "learning_rate", "0"),
    case("federated --seed -1", "seed", "-1"),
    case("federated --seed 99999999999999999999", "seed: expected a number below 2**63"),
    case("federated --image_size 1000000", "image_size", "less than or equal to 4096"),
    case("federated --threads 1000000000", "threads", "less than or equal to 1024"),
    case("federated --workers 1000000", "workers", "less than or equal to 1024"),
    case("demo --seed -1", "seed", "-1"),
    case("federated --prox_mu 0.1", "--prox_mu 0.1: is of --algorithm fedprox"),
    case("federated --algorithm fedavgm --server_tau 0.1", "--server_tau 0.1", "fedadagrad or fedadam or fedyogi"),
    case("federated --algorithm fednova --server_learning_rate 1", "--server_learning_rate 1", "fedavgm or scaffold"),
    case("federated --algorithm fedadam --server_momentum 1", "server_momentum", "less than 1"),
    case("federated --personalise_clients 2", "--personalise_clients 2", "give --personalise_steps too"),
    case("federated --personalise_steps 1 --personalise_clients 9", "there are only 4 clients"),
    case("federated --warmup 1", "--warmup 1: must be below the 1 epochs or rounds"),
    case("centralized --warmup 1", "--warmup 1: must be below the 1 epochs or rounds"),
    case("federated --learning_rate inf", "learning_rate", "inf"),
    case("federated --weight_decay inf", "weight_decay", "inf"),
    case("editing --target_sparsity 0.99999999", "target_sparsity"),
    # data that cannot be split as asked
    case("federated --num_clients 101", "--num_clients 101", "100 training examples", "choose 1 to 100"),
    case("federated --partition label_skew --classes_per_client 11", "--classes_per_client 11", "choose 1 to 10"),
    case("federated --partition label_skew --classes_per_client 2", "all 10 classes", "raise --num_clients to 5"),
    case("federated --partition label_skew --num_clients 90", "the smallest class has", "choose the dirichlet split"),
    case("federated --partition dirichlet --min_client_size 200", "200 with 4 clients", "choose 1 to 25"),
    case("federated --partition quantity --min_client_size 200", "--min_client_size 200", "choose 1 to 25"),
    case("federated --partition dirichlet --alpha inf", "alpha: input should be a finite number"),
    case("federated --train_skip 100000", "--train_skip 100000", "training images"),
    case("federated --val_fraction 1e-9", "--val_fraction 1e-09", "take more or add images"),
    case("federated --val_fraction 0.9999", "--val_fraction 0.9999", "take less, or add images"),
    case("editing --calibration_fraction 0", "calibration split is empty", "raise --calibration_fraction"),
    # masks and what moves
    case("federated --mask nowhere.safetensors", "mask nowhere.safetensors: no such file", "fedtalos editing"),
    case("federated --mask images", "mask images: no such file"),
    case("federated --mask masks/tiny.safetensors", "(size tiny / micro;", "give the model"),
    case(
        "federated --mask masks/m.safetensors --patch_size 4", "not made for this: --patch_size 2 / 4", "--force_mask"
    ),
    case("centralized --mask masks/m.safetensors --trainable head", "--trainable head and --mask", "give one"),
    case("federated --trainable head --freeze_head", "nothing may move", "drop one"),
    case(f"federated --mask {'a' * 300}", "aaa"),
    case(
        "federated --dataset cifar100 --mask nowhere.safetensors",
        "mask nowhere.safetensors",
    ),
    case(
        "federated --mask masks/foreign.safetensors --head random",
        "not made for this: weights others / none, seed 0",
        "add --force_mask",
    ),
    case("mask shwo masks/m.safetensors", "no mask command 'shwo'", "did you mean 'show'"),
    case("mask show nowhere.safetensors", "mask nowhere.safetensors: no such file", "fedtalos editing"),
    case("mask show masks/m.safetensors --output_dir file.txt", "file.txt"),
    case(
        "mask compare masks/m.safetensors", "mask compare: expected two or more mask files, got 1", "fedtalos mask show"
    ),
    case("mask compare masks/m.safetensors masks/tiny.safetensors", "made for different models"),
    case("mask compare masks/m.safetensors masks/m.safetensors", "each with its own name, got 2 named masks_m"),
    case("mask compare masks/m.safetensors masks/rest.safetensors --name ..", "--name '..'"),
    case("mask combine --name x", "mask combine: expected FILE FILE..."),
    case("mask combine masks/m.safetensors masks/tiny.safetensors --name x --force", "made for different models"),
    case(
        "mask combine masks/m.safetensors masks/foreign.safetensors --name x",
        "weights none, seed 0",
        "/ others",
        "add --force",
    ),
    case(
        "mask combine masks/m.safetensors masks/rest.safetensors --name x --rule intersection",
        "no entry may move in 2 of the 2 masks",
        "take rule union",
    ),
    case("mask combine masks/m.safetensors masks/rest.safetensors --name x --quorum 0", "quorum", "greater than 0"),
    case("mask combine masks/m.safetensors masks/rest.safetensors --name x --quorum 1.5", "quorum", "1.5"),
    case("mask combine masks/m.safetensors masks/rest.safetensors --name kept", "masks/kept.safetensors exists"),
    case("mask combine masks/m.safetensors masks/rest.safetensors --name a/b", "--name 'a/b': expected a plain"),
    case("mask combine masks/m.safetensors masks/rest.safetensors --name x --output_dir file.txt", "file.txt"),
    # heads, sizes, devices
    case("federated --head nowhere", "--head nowhere: no such file", "or a head file"),
    case("federated --model_size tiny --head masks/m.head.safetensors", "(10, 96)", "need (10, 192)"),
    case("federated --head weights", "--head weights", "use random, ridge, ncm, linear or a head file"),
    case("editing --head random", "--head random: scores through an untrained head", "fit one (ridge)"),
    case("editing --head linear", "--head linear", "use ridge or ncm"),
    case("federated --head ridge --head_rounds 3", "--head_rounds", "give --head linear too"),
    case("centralized --head_learning_rate 0.1", "--head_learning_rate", "give --head linear too"),
    case("federated --head linear --head_rounds 0", "head_rounds", "0"),
    case("editing --calibration federated --criterion random", "--calibration federated: random looks at no images"),
    case("editing --criterion taloss", "--criterion: ", "'taloss'", "'least_sensitive'"),
    case("editing --calibration_clients 2", "--calibration_clients", "give --calibration federated too"),
    case("editing --calibration_client 2", "--calibration_client", "give --calibration federated too"),
    case(
        "editing --calibration federated --calibration_client 0 --calibration_clients 1",
        "--calibration_client and --calibration_clients",
        "give one of them",
    ),
    case(
        "editing --calibration federated --num_clients 4 --calibration_client 4",
        "--calibration_client 4",
        "0 to 3",
    ),
    case("editing --calibration federated --calibration_client -1", "--calibration_client: ", "got '-1'"),
    case("editing --fisher exact --fisher_samples 2", "--fisher_samples 2: is of --fisher true, not of exact"),
    case("editing --fisher_samples 0", "fisher_samples", "0"),
    case("editing --calibration federated --fisher batch", "--fisher batch", "leave out --calibration"),
    case(
        "editing --calibration federated --num_clients 4 --calibration_clients 5", "--calibration_clients 5", "only 4"
    ),
    case("federated --force_mask", "--force_mask: has no effect without --mask", "give --mask too"),
    case("federated --mask masks/m.safetensors --seed 10", "weights none, seed 0", "none, seed 10", "--force_mask"),
    case("federated --mask masks/m.safetensors --image_size 16", "at 8 px", "at 16 px", "--force_mask"),
    case("editing --calibration federated --num_clients 1000", "--num_clients 1000", "100 training examples"),
    case("federated --image_size 9", "image size 9 is not a multiple of patch size 2", "choose --image_size"),
    case("federated --patch_size 16", "image size 8 is not a multiple of patch size 16"),
    case(
        "federated --dataset folder --data_dir images --image_size 9",
        "not a multiple of patch size 2",
    ),
    # weights and checkpoints by name (what is wrong with their files: test_bad_files.py)
    case("centralized --weights nowhere.safetensors", "--weights nowhere.safetensors: no such file", "none"),
    case("centralized --weights hf:owner/repo/README.md", "hf:OWNER/REPO[/FILE]"),
    case("centralized --weights pretraned", "--weights pretraned: expected none, pretrained, dino"),
    case("centralized --weights pretrained", "--weights pretrained", "not for micro", "--model_size"),
    case("centralized --weights weights/whole.safetensors --patch_size 4", "--patch_size 4: ", "is a ViT-micro/2"),
    case(
        "centralized --weights nowhere/last.json", "checkpoint nowhere/last.json", "give a run's name or its .json file"
    ),
    case("evaluate nowhere", "checkpoint nowhere", "give a run's name or its .json file"),
    case("evaluate m", "m/last.json: holds no trained model"),
    case("editing --weights auto --checkpoint nowhere", "checkpoint nowhere", "give a run's name or its .json file"),
    case("editing --weights auto --checkpoint m", "checkpoints/m/last.json: holds no model", "give another"),
    # names, resuming, places to write to
    case("federated --run_name done", "results/done exists: add --resume", "another --run_name"),
    case("federated --run_name orphan", "checkpoints/orphan exists, of an earlier run", "another --run_name"),
    case("editing --run_name kept --criterion random", "masks/kept.safetensors"),
    case("federated --run_name a/b", "--run_name 'a/b': expected a plain folder name"),
    case(f"federated --run_name {'a' * 235}", "--run_name 'aaa", "expected at most 200 bytes"),
    case("federated --dp_noise 1e15 --max_update_norm 1", "dp_noise: input should be less than or equal to 1000"),
    case("federated --run_name ..", "--run_name '..': expected a plain folder name"),
    case(f"federated --run_name {'a' * 300}", "aaa"),
    case("federated --output_dir file.txt", "file.txt"),
    case("demo --output_dir file.txt", "file.txt"),
    case("plot --masks masks/m.safetensors --output_dir file.txt", "file.txt"),
    case("centralized --resume --run_name stopped --learning_rate 0.5", "learning_rate was 0.01 in stopped, now 0.5"),
    case("centralized --resume --run_name stopped --num_epochs 2", "num_epochs was 1 in stopped, now 2"),
    case("centralized --resume --run_name done --num_epochs 2", "num_epochs"),
    case("centralized --resume --run_name ..", "--run_name '..': expected a plain folder name"),
    case("federated --resume --run_name stopped", "centralized"),
    case("federated --resume --run_name done", "centralized"),
    # data sets and plots by name
    case("federated --dataset folder --data_dir nowhere", "--data_dir nowhere: no such folder"),
    case("federated --dataset folder --data_dir file.txt", "--data_dir file.txt: no such folder"),
    case("federated --dataset folder --data_dir void", "void holds no class folders: expected void/CLASS/IMAGE"),
    case("plot", "expected runs or --masks, got neither"),
    case("plot nowhere", "run results/nowhere", "found no metrics.csv"),
    case("plot done nowhere", "run results/nowhere", "found no metrics.csv"),
    case("plot done done", "each with its own name, got 2 named done"),
    case("plot --masks nowhere.safetensors", "mask nowhere.safetensors: no such file"),
    case("plot --masks masks/m.safetensors masks/tiny.safetensors", "made for different models"),
    case("plot done --name ..", "--name"),
]


@pytest.mark.parametrize(("command", "said"), SENTENCES)
def test_one_sentence(command, said, capsys, monkeypatch):
    without_network(monkeypatch)
    says = sentence(spelled(command), capsys)
    assert [words for words in said if words not in says] == []


WORDS = ["", "much", "-1e999", "nan", "9" * 5000, "x" * 5000, "\x1b[2J", "\udce9", "\u202ea", "None"]
"""Values that are of no use to most options."""
EVERY = {
    f"{name} {tool}" if name in FAMILIES else name: options
    for name, config in COMMANDS.items()
    for tool, options in (tools_of(name) if name in FAMILIES else {"": config}).items()
}
"""Options of every command that there is."""
TRIED = set[int]()
"""Options that commands share are tried with the first of them."""


@pytest.mark.parametrize("command", EVERY)
def test_any_word_for_any_option(command):
    """Whatever an option is given, it is taken or refused in one short line that names it; numbers take no text."""
    needed = [
        word
        for option, field in every_option(EVERY[command]).items()
        if field.is_required()
        for word in ([] if is_positional(field) else [f"--{option}"]) + ["digits" if option == "dataset" else "1"]
    ]
    for option, field in option_names(EVERY[command]).items():
        if field.annotation is bool or id(field) in TRIED:
            continue
        TRIED.add(id(field))
        takes_text = {str, Path} & set(help_pages.types(field.annotation))
        for word in WORDS:
            with refused_if_at_all() as said:
                parse([*command.split(), *needed, f"--{option}", word])
            assert said or word != "much" or takes_text, option
            assert not said or option in said[0] or option in ("config", "preset"), said


def without_network(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "RETRIES", 0)  # they wait for seconds in between


def test_no_network_for_a_download(capsys, monkeypatch):
    without_network(monkeypatch)
    says = refused(spelled("federated --dataset cifar100 --data_dir void"), capsys).splitlines()[-1]
    assert says.startswith("fedtalos: cifar-100-python.tar.gz could not be fetched from https://")
    assert "put the file into void by hand" in says


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("command", ["federated", "editing", "evaluate done", "demo"])
def test_a_device_that_is_not_there(command, device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    says = sentence(spelled(f"{command} --device {device}"), capsys)
    assert f"--device {device}: not available here; available: cpu" in says


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(tracker, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    says = sentence(spelled(f"federated --tracker {tracker}"), capsys)
    assert (
        f"--tracker {tracker}: not installed; in the checkout: pip install -c constraints.txt -e '.[{tracker}]'" in says
    )


def test_a_tracker_without_an_account(capsys, monkeypatch):
    wandb = types.ModuleType("wandb")
    wandb.login, wandb.__spec__ = lambda prompt: False, ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    says = sentence(spelled("federated --tracker wandb"), capsys)
    assert "--tracker wandb: no account is set up; run `wandb login`, or set WANDB_MODE=offline" in says


def test_no_preset_file(capsys, monkeypatch):
    monkeypatch.setattr(config_files, "PRESETS", Path("nowhere/presets.yaml"))
    says = sentence(spelled("federated --preset quick"), capsys)
    assert "nowhere/presets.yaml: no such file here" in says


def test_a_flag_mends_what_a_file_leaves_impossible():
    config = parse(spelled("federated --config warm.yaml --num_rounds 200"))
    assert isinstance(config, FederatedConfig)
    assert (config.train.warmup, config.federation.num_rounds) == (150, 200)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate flipped", "is not what was saved (checksum)"),
        ("centralized --model_size tiny --weights pretrained", "or give weights FILE or none"),
    ],
)
def test_as_a_process(command, said):
    before = everything()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "nowhere", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "main.py"), *spelled(command)]
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert everything() == before
