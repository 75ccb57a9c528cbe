"""Options that have no effect beside the others are refused where somebody chose them, and only there."""

import shlex
from pathlib import Path

import pytest
import yaml

from fedtalos.app.config.checks import GIVEN, USED_WHEN, check_together
from fedtalos.app.config.files import flatten, override
from fedtalos.app.config.schema import RUN_CONFIGS, ContinualConfig, EditingConfig, FederatedConfig, SplitOptions
from fedtalos.app.sweep.grid import Grid, expand
from fedtalos.cli import main, parse
from fedtalos.errors import InputError

OTHERS = {  # values that are not the default
    "weights": "none",
    "force_mask": True,
    "mask_mode": "prune",
    "partition": "dirichlet",
    "save_vector": True,
    "task_order": "random",
    "local_classes": "all",
    "fisher": "exact",
    "final_rate": 0.5,
    "server_momentum": 0.5,
    "byzantine": 2,
    "client_sampling": "poisson",
    "warmup": 1,
}
OF_MANY_ROUNDS = ("num_rounds", "client_fraction", "client_sampling", "warmup")
EVERY = {name: config for config in RUN_CONFIGS.values() for name in flatten(config())}
ALWAYS_USED = """
    config preset run_name resume resume_or_start output_dir seed device precision compile threads tracker
    dataset data_dir val_fraction split_seed calibration_fraction train_skip train_limit eval_limit eval_batch_size
    cache_gb model_size image_size patch_size normalisation head
    mask trainable freeze_head optimizer learning_rate weight_decay batch_size augmentation clip_norm schedule
    eval_every early_stop num_epochs local_epochs clients_at_once workers algorithm
    aggregation max_update_norm attack attackers dp_noise on_bad_client dropout_rate deadline
    tasks one_shot merge merge_alpha refit_head leave_out
    client_evaluation personalise_steps checkpoint target_sparsity num_iterations criterion eligible granularity
    calibration train_head resize cache_dir
"""
"""Some have conditions of their own in check_together: attack and attackers, train_head, ..."""


def test_of_every_option_somebody_decided_when_it_is_used():
    always = set(ALWAYS_USED.split())
    assert EVERY.keys() - USED_WHEN.keys() - always == set(), "put it into USED_WHEN, or above"
    assert not USED_WHEN.keys() & always
    for option, conditions in USED_WHEN.items():
        assert option in EVERY
        assert all(other in EVERY for other, _ in conditions)


def commands_of(option: str) -> list[str]:
    """The commands that have an option and one of those that it depends on."""
    others = {other for other, _ in USED_WHEN[option]}
    used = {name: flatten(config()).keys() - set(config.idle) for name, config in RUN_CONFIGS.items()}
    return [name for name, has in used.items() if option in has and others & has]


def unusual(option: str) -> object:
    """A value that is not the default."""
    default = flatten(EVERY[option]())[option]
    if option in OTHERS:
        return OTHERS[option]
    return 0.05 if default is None and "rate" in option else 2 if default is None else default / 2 if default < 1 else 7


def fulfilling(command: str, option: str) -> dict[str, object]:
    """Options by which ``option`` is used."""
    made_up = {"mask": "m.safetensors", "deadline": 50.0, "dp_noise": 1.0, "personalise_steps": 1, "tasks": 2}
    found: dict[str, object] = {}
    for other, wanted in USED_WHEN[option]:
        if other in flatten(RUN_CONFIGS[command]()):
            found[other] = made_up[other] if GIVEN in wanted else wanted[0]
    return found


def hindering(command: str, option: str) -> dict[str, object]:
    """Options by which ``option`` is not used; most defaults are."""
    return {
        "save_vector": {"tasks": 2},
        "weights": {"checkpoint": "a"},
        "num_clients": {"partition": "given"} | ({"calibration": "federated"} if command == "editing" else {}),
        "local_steps": {"local_epochs": 1},
        "final_rate": {"schedule": "step"},
        **{name: {"one_shot": True} for name in OF_MANY_ROUNDS},
    }.get(option, {"criterion": "random"} if ("criterion", USED_WHEN[option][0][1]) == USED_WHEN[option][0] else {})


CASES = [(command, option) for option in USED_WHEN for command in commands_of(option)]


@pytest.mark.parametrize(("command", "option"), CASES)
def test_an_option_is_refused_where_it_has_no_effect_and_nowhere_else(command, option):
    config, value = RUN_CONFIGS[command](), unusual(option)

    def check(others: dict[str, object], given: set[str] | None) -> None:
        check_together(override(config, {**others, option: value}, "test"), given)

    hindrance = hindering(command, option)
    for given in (None, {option}):
        with pytest.raises(InputError, match=f"--{option}"):
            check(hindrance, given)
    check(hindrance, set())  # nobody chose it
    check_together(override(config, hindrance, "test"))  # at its default
    if option not in ("dp_delta", "force_mask", "mask_mode", "calibration_client", "weights"):  # these want more
        check(fulfilling(command, option), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "federated --alpha 0.1",
            "--alpha 0.1: is of --partition dirichlet or quantity, not of iid; choose one of these",
        ),
        ("federated --partition dirichlet --classes_per_client 2", "is of --partition label_skew, not of dirichlet"),
        ("federated --min_client_size 1", "is of --partition dirichlet or quantity, not of iid"),
        ("centralized --momentum 0.5", "is of --optimizer sgd, not of adamw; give --optimizer sgd too"),
        ("federated --step_every 3", "is of --schedule step, not of cosine"),
        ("federated --schedule constant --step_gamma 0.5", "is of --schedule step, not of constant"),
        ("federated --local_epochs 1 --local_steps 8", "--local_steps 8 and --local_epochs 1: one of them is used"),
        ("editing --num_clients 7", "is of --calibration federated, not of central"),
        (
            "editing --criterion random --soft_zero 0.1",
            "is of --criterion least_sensitive or most_sensitive, not of random",
        ),
        ("editing --fisher exact --fisher_samples 2", "--fisher_samples 2: is of --fisher true, not of exact"),
        ("editing --checkpoint a --weights none", "--weights none and --checkpoint a: one of them is used"),
        ("editing --tracker tensorboard", "no option --tracker; it is an option of centralized and federated and"),
        ("federated --slowest 2", "--slowest 2: has no effect without --deadline; give --deadline too"),
        ("federated --byzantine 2", "is of --aggregation trimmed_mean or krum or multi_krum, not of mean"),
    ],
)
def test_what_is_said(words, said):
    with pytest.raises(InputError, match=said):
        parse(shlex.split(words))


def test_a_preset_is_asked_as_flags_are_and_a_file_only_of_its_own_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text("p: {command: editing, num_clients: 7}")
    Path("f.yaml").write_text(
        "num_clients: 7\npartition: label_skew\nclasses_per_client: 2\nweights: none\nalpha: 0.3\n"
    )
    with pytest.raises(InputError, match="--num_clients 7: is of --calibration federated"):
        parse(["editing", "--preset", "p"])
    assert parse(["editing", "--config", "f.yaml", "--checkpoint", "a"]).split.num_clients == 7  # is for federated, too
    assert parse(["federated", "--config", "f.yaml"]).split.classes_per_client == 2
    with pytest.raises(InputError, match="--classes_per_client 2: is of --partition label_skew, not of iid"):
        parse(["federated", "--config", "f.yaml", "--partition", "iid"])


def test_a_grids_shared_options_may_be_of_some_of_its_runs_only():
    axes = {"split": {"iid": {}, "nc2": {"partition": "label_skew"}}}
    shared = {"classes_per_client": 2, "optimizer": "adamw", "momentum": 0.5, "calibration_images": 10}
    blocks = [
        {"command": "federated", "axes": axes},
        {"name": "m", "command": "editing", "options": {"criterion": "random"}},
    ]
    cells = expand("g", Grid(grid=blocks, options=shared), {})
    assert len(cells) == 3
    with pytest.raises(InputError, match=r"g-iid-s0: --classes_per_client 2: is of"):
        expand("g", Grid(grid=[{"command": "federated", "axes": axes, "options": {"classes_per_client": 2}}]), {})


def test_a_runs_own_record_is_taken_as_it_is(in_a_folder_of_its_own, without_figures):
    small = shlex.split(
        "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --device cpu "
        "--train_limit 60 --eval_limit 20 --num_rounds 1 --num_clients 2 --local_steps 1 --run_name a"
    )
    main(["federated", *small])
    path = Path("results/a/config.yaml")
    config = yaml.safe_load(path.read_text()) | {"alpha": 0.1, "momentum": 0.5}  # as by a version that did not ask
    path.write_text(yaml.safe_dump(config))
    main(["federated", "--config", str(path), "--run_name", "b"])
    with pytest.raises(SystemExit, match="2"):
        main(["federated", "--config", str(path), "--alpha", "0.1", "--run_name", "c"])
    assert Path("results/b/summary.yaml").exists()
    assert not Path("results/c").exists()


def test_continual_has_no_use_for_what_a_file_says_of_clients_one_by_one():
    with pytest.raises(InputError, match="--client_evaluation: continual has no use for it"):
        check_together(override(ContinualConfig(), {"tasks": 2, "client_evaluation": True}, "test"))


def test_workers_are_not_asked_again():
    config = override(FederatedConfig(), {"alpha": 0.1}, "test")
    check_together(config, set())
    assert {"num_clients", "alpha"} <= SplitOptions.model_fields.keys() & flatten(EditingConfig()).keys()


def test_the_quorum_is_of_votes(in_a_folder_of_its_own, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split("mask combine a.safetensors b.safetensors --name c --quorum 0.7"))
    assert "--quorum 0.7: is of --rule vote, not of union" in capsys.readouterr().err
