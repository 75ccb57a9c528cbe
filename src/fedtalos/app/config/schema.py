"""Every knob, its default and its limits: the only schema, read from YAML, presets and flags alike.

Groups below become the groups of the help; flags and YAML keys are the flat field names.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import tyro
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from fedtalos.data.batches import Augmentation
from fedtalos.data.dataset_loader import DatasetName
from fedtalos.errors import InputError, shown
from fedtalos.models.vision_transformer import ModelSize
from fedtalos.training.editing.fisher import FisherMode
from fedtalos.training.editing.mask_file import JoinRule
from fedtalos.training.editing.talos import Criterion, Eligible, Granularity
from fedtalos.training.federated.aggregation import Rule
from fedtalos.training.federated.fedavg import OnBadClient
from fedtalos.training.federated.transforms import Attack

Algorithm = Literal["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "fednova"]
ADAPTIVE: tuple[Algorithm, ...] = ("fedadagrad", "fedadam", "fedyogi")
ADJUST_GRADIENTS: tuple[Algorithm, ...] = ("fedprox", "scaffold")
LOOKS_AT_IMAGES: tuple[Criterion, ...] = ("least_sensitive", "most_sensitive")


def unset(metavar: str, default: str) -> object:
    """How the help shows a knob whose default is worked out, or none."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


class Options(BaseModel):
    """A group of knobs; unknown keys, and values outside their limits, are InputErrors of one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        for name, value in values.items() if isinstance(values, dict) else ():
            expected = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if isinstance(value, bool) and expected is not bool and str(value).lower() not in get_args(expected):
                raise InputError(f"{name}: expected no yes or no, got {str(value).lower()}")  # True would count as 1
        try:
            options = handler(values)
        except ValidationError as error:
            raise InputError(sentence(error)) from error
        for name, value in options:
            if isinstance(value, int) and abs(value) >= 2**63:
                raise InputError(f"{name}: expected a number below 2**63, got {shown(value)}")
            if isinstance(value, float) and abs(value) > 1e15:  # float32 has no room for products of larger ones
                raise InputError(f"{name}: expected a number up to 1e15, got {shown(value)}")
            if isinstance(value, str | Path) and "\0" in str(value):
                raise InputError(f"{name}: expected text without NUL characters, got {shown(str(value))}")
        return options


def sentence(error: ValidationError) -> str:
    """The first thing wrong, in one sentence with the knob's name."""
    first = error.errors()[0]
    knob = str(first["loc"][-1])
    return f"{knob}: {first['msg'][0].lower()}{first['msg'][1:]}, got {shown(first['input'])}"


class RunOptions(Options):
    """Where the run happens and where it is written."""

    config: Annotated[Path | None, unset("FILE", "none")] = Field(
        None, description="YAML file of options; the preset and flags beat it"
    )
    preset: Annotated[str | None, unset("NAME", "none")] = Field(
        None, description="entry of configs/experiment_configs.yaml; flags beat it"
    )
    run_name: Annotated[str | None, unset("NAME", "command and time")] = Field(
        None, description="folder name under results/"
    )
    resume: bool = Field(False, description="go on with --run_name, else with the newest unfinished run")
    output_dir: Path = Field(Path(), description="holds results/ checkpoints/ masks/ plots/")
    seed: int = Field(0, ge=0, description="source of every random draw")
    device: Literal["auto", "mps", "cuda", "cpu"] = Field("auto", description="auto: mps, then cuda, then cpu")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where it is faster here, measured"
    )
    threads: Annotated[int | None, unset("N", "all cores, shared among the workers")] = Field(
        None, ge=1, le=1024, description="CPU threads of each process; results differ in their last bits with it"
    )
    tracker: Literal["none", "tensorboard", "wandb"] = Field("none", description="also log there")


class DataOptions(Options):
    """Which images."""

    dataset: DatasetName = Field("cifar100", description="digits needs no download; folder: class folders in data_dir")
    data_dir: Path = Field(Path("data"), description="where the data set is, or is downloaded to")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of training images held out for validation")
    split_seed: int = Field(0, ge=0, description="draws validation and calibration images, the same for every seed")
    calibration_fraction: float = Field(
        0.02, ge=0, lt=1, description="share of the others held out to calibrate masks on"
    )
    train_skip: int = Field(0, ge=0, description="leave out the first n training images")
    train_limit: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="use only the first n training images, for trials"
    )
    eval_limit: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="use only n validation and n test images, for trials"
    )
    eval_batch_size: int = Field(250, ge=1, description="images per forward pass without gradients")
    cache_gb: float = Field(
        1.0,
        ge=0,
        description="memory, of each process, for what frozen blocks make of plain images; else a file",
    )


class ModelOptions(Options):
    """Which Vision Transformer, and from which weights it starts."""

    model_size: Annotated[ModelSize | None, unset("{micro,tiny,small,base,large}", "as the weights; small")] = Field(
        None, description="parameters: 0.7, 5.7, 22, 86, 303 million"
    )
    weights: str = Field(
        "pretrained",
        description="none, pretrained, dino, a timm ViT's NAME, hf:OWNER/REPO[/FILE], a FILE, a checkpoint, or "
        "timm:NAME or torch:NAME (docs/backbones.md)",
    )
    image_size: Annotated[int | None, unset("PX", "as the weights had; 32 for none")] = Field(
        None, ge=1, le=4096, description="pixels a side"
    )
    patch_size: Annotated[int | None, unset("PX", "as the weights had; 4 for none")] = Field(
        None, ge=1, description="pixels a patch side"
    )
    normalisation: Literal["auto", "imagenet", "half"] = Field(
        "auto", description="pixel mean and std; auto: as the weights say; half: 0.5"
    )
    head: str = Field(
        "auto",
        description="weights (their own), random, fitted first (ridge, ncm: closed form; linear: trained) or a head "
        "FILE; auto: their own where it fits the classes, else random, in editing ridge",
    )


class TrainOptions(Options):
    """What moves, and how."""

    trainable: Literal["all", "head", "blocks"] = Field("all", description="what may move (without a mask)")
    freeze_head: bool = Field(False, description="keep the head as it starts")
    head_rounds: Annotated[int | None, unset("N", "100 rounds, 10 epochs")] = Field(
        None, ge=1, description="of head linear: rounds, or epochs in centralized, of the head alone before the run"
    )
    head_learning_rate: Annotated[float | None, unset("FLOAT", "0.1")] = Field(
        None, gt=0, description="of head linear: its peak (sgd, on the schedule of the run)"
    )
    mask: Annotated[Path | None, unset("FILE", "none")] = Field(
        None, description="only its True entries move (and a new head)"
    )
    force_mask: bool = Field(False, description="use a mask that was made on other weights, too")
    mask_mode: Literal["finetune", "prune"] = Field("finetune", description="frozen entries keep their value, or are 0")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="update rule on each client, or of the epoch")
    learning_rate: Annotated[float | None, unset("FLOAT", "1e-4; with a mask or weights none 1e-3")] = Field(
        None, gt=0, description="peak; sgd takes ten times adamw's default"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(0.01, ge=0, description="decoupled for adamw, L2 for sgd")
    batch_size: int = Field(64, ge=1, description="images per step")
    augmentation: Literal["auto"] | Augmentation = Field(
        "auto", description="auto: crop_flip; none for digits, and where only the head moves"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="gradient norm of what moves at most this, or None")
    schedule: Literal["constant", "cosine", "step"] = Field("cosine", description="of the learning rate")
    warmup: int = Field(0, ge=0, description="epochs or rounds of linear warm-up")
    step_every: int = Field(30, ge=1, description="epochs or rounds between steps of the step schedule")
    step_gamma: float = Field(0.1, gt=0, le=1, description="factor of each step")
    eval_every: Annotated[int | None, unset("N", "1 epoch, 10 rounds")] = Field(
        None, ge=1, description="epochs or rounds between validations and checkpoints"
    )


class SplitOptions(Options):
    """Who holds which training images."""

    num_clients: int = Field(100, ge=1, description="K, clients that hold the training images")
    partition: Literal["iid", "label_skew", "dirichlet", "quantity"] = Field("iid", description="how images are split")
    classes_per_client: int = Field(5, ge=1, description="Nc, of label_skew")
    alpha: float = Field(0.3, gt=0, description="concentration of dirichlet and quantity; smaller: more skew")
    min_client_size: int = Field(10, ge=1, description="fewest images of a client under dirichlet and quantity")


class FederationOptions(Options):
    """Rounds."""

    num_rounds: int = Field(100, ge=1, description="aggregations")
    client_fraction: float = Field(0.1, gt=0, le=1, description="C, share of clients sampled each round")
    local_steps: int = Field(4, ge=1, description="J, optimiser steps per client and round")
    local_epochs: Annotated[int | None, unset("N", "none")] = Field(
        None, ge=1, description="passes over the client's images, instead of local_steps"
    )
    clients_at_once: Annotated[int | None, unset("V", "1; on cuda what is fastest")] = Field(
        None, ge=1, description="clients of a round that train together; same results up to rounding"
    )
    workers: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that share a round's clients, each with its part of the cores, or a GPU",
    )


class AlgorithmOptions(Options):
    """What clients and server do, where it is more than FedAvg."""

    algorithm: Algorithm = Field("fedavg", description="docs/method.md has their formulas")
    prox_mu: float = Field(0.01, ge=0, description="of fedprox: pull of a client towards the global values")
    server_learning_rate: Annotated[float | None, unset("FLOAT", "1; of the adaptive ones 1e-3")] = Field(
        None, gt=0, description="of fedavgm, scaffold and the adaptive ones: fedadagrad, fedadam, fedyogi"
    )
    server_momentum: Annotated[float | None, unset("FLOAT", "0.9; of fedadagrad 0")] = Field(
        None, ge=0, lt=1, description="of fedavgm; beta1 of the adaptive ones"
    )
    server_beta2: float = Field(0.99, ge=0, lt=1, description="of fedadam and fedyogi: memory of squared updates")
    server_tau: float = Field(1e-3, gt=0, description="of the adaptive ones: updates far below it are not scaled up")


class AggregationOptions(Options):
    """What the server makes of the clients' updates, where it trusts them less, or is to tell less of them."""

    aggregation: Literal["mean"] | Rule = Field("mean", description="of the clients' values; docs/robustness.md")
    byzantine: int = Field(1, ge=0, description="f, attackers in a round that trimmed_mean and the krums withstand")
    max_update_norm: Annotated[float | None, unset("FLOAT", "none")] = Field(
        None, gt=0, description="S, scale longer updates down to this 2-norm"
    )
    attack: Literal["none"] | Attack = Field(
        "none", description="to try: attackers send -1, -100, NaN times the update"
    )
    attackers: int = Field(0, ge=0, description="clients of K that attack, drawn")
    dp_noise: Annotated[float | None, unset("FLOAT", "none")] = Field(
        None, gt=0, description="z, Gaussian noise of deviation z S on the sum of updates: differential privacy"
    )
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="delta for which epsilon is given; well below 1 / K")


class FailureOptions(Options):
    """Clients that fail: what to do then, and some to try it with."""

    on_bad_client: OnBadClient = Field(
        "stop", description="where a client's training or update is not finite: stop, or leave it out of the round"
    )
    dropout_rate: float = Field(0.0, ge=0, lt=1, description="chance that a sampled client sends nothing, drawn")
    slowest: float = Field(
        1.0, ge=1, le=1e6, description="a client's step takes 1 to this many times the fastest's, drawn once"
    )
    deadline: Annotated[float | None, unset("STEPS", "none")] = Field(
        None, gt=0, description="steps of the fastest client, after which a round waits for nobody"
    )


class PersonalOptions(Options):
    """How each client fares with the final model, at the end."""

    client_evaluation: bool = Field(False, description="test accuracy by client, weighted by the classes it holds")
    personalise_steps: int = Field(0, ge=0, description="fine-tune for each client so many steps, and test again")
    personalise_clients: Annotated[int | None, unset("M", "all")] = Field(
        None, ge=1, description="personalise for only so many clients, drawn"
    )


class EditingOptions(Options):
    """How the mask is made."""

    checkpoint: Annotated[Path | None, unset("RUN|FILE", "the --weights")] = Field(
        None, description="run or file under checkpoints/ to edit, with its head"
    )
    target_sparsity: float = Field(0.9, ge=0, lt=1, description="share of eligible entries that stay frozen")
    num_iterations: int = Field(4, ge=1, description="R, rounds of scoring and excluding")
    criterion: Criterion = Field("least_sensitive", description="which entries may move")
    eligible: Eligible = Field("blocks", description="entries to choose from: all in the blocks, or only these")
    granularity: Granularity = Field("entry", description="what stays or goes together; coarser saves more time")
    soft_zero: float = Field(0.01, gt=0, le=1, description="factor on excluded entries while scoring (never 0)")
    fisher: Annotated[FisherMode, BeforeValidator(lambda value: "true" if value is True else value)] = Field(  # YAML
        "true", description="labels: drawn, all by probability, as given; batch: a common error, to compare"
    )
    fisher_samples: int = Field(1, ge=1, description="labels drawn per image, of true")
    fisher_chunk: Annotated[int | None, unset("N", "as fits; at most 16 on cpu")] = Field(
        None, ge=1, description="examples per backward pass of the scores"
    )
    calibration_images: int = Field(
        640, ge=1, description="at most about this many images scored per iteration, in all"
    )
    calibration: Literal["central", "federated"] = Field(
        "central", description="the calibration split, or every client's own training images"
    )
    calibration_clients: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="federated: only so many clients score, drawn"
    )
    merge: Literal["scores"] | JoinRule = Field(
        "scores", description="federated: the server adds scores, or joins masks that clients made alone"
    )
    quorum: float = Field(0.5, gt=0, le=1, description="share of clients that must let an entry move, of merge vote")
    personal_masks: bool = Field(False, description="also write every client's own mask, under masks/RUN/")


class Config(Options):
    """What the three training commands share."""

    command: ClassVar[str]

    run: RunOptions = RunOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()


class CentralizedConfig(Config):
    """Train on all images in one place: the baseline."""

    command: ClassVar[str] = "centralized"

    train: TrainOptions = TrainOptions()
    num_epochs: int = Field(100, ge=1, description="passes over the training images")


class FederatedConfig(Config):
    """Train with federated averaging over clients that keep their images."""

    command: ClassVar[str] = "federated"

    train: TrainOptions = TrainOptions()
    split: SplitOptions = SplitOptions()
    federation: FederationOptions = FederationOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    aggregation: AggregationOptions = AggregationOptions()
    failures: FailureOptions = FailureOptions()
    personal: PersonalOptions = PersonalOptions()


class EditingConfig(Config):
    """Make a TaLoS mask: score weights on calibration images, keep the least sensitive."""

    command: ClassVar[str] = "editing"

    editing: EditingOptions = EditingOptions()
    split: SplitOptions = SplitOptions()


RunConfig = CentralizedConfig | FederatedConfig | EditingConfig
RUN_CONFIGS: dict[str, type[RunConfig]] = {c.command: c for c in (CentralizedConfig, FederatedConfig, EditingConfig)}
