"""Every option of the training commands, its default and its limits: one schema for YAML, presets and flags.

A group below is a group of the help, with its docstring as heading; flags and YAML keys are the plain field names.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import BeforeValidator, Field

from fedtalos.app.config.apart import ApartOptions
from fedtalos.app.config.dataset import Dataset
from fedtalos.app.config.options import DEVICE, EVERYDAY, Device, Options, unset
from fedtalos.data.view import Augmentation
from fedtalos.devices import Precision
from fedtalos.models.vision_transformer import ModelSize
from fedtalos.training.editing.eligible import Eligible
from fedtalos.training.editing.fisher import FisherMode
from fedtalos.training.editing.ranking import Granularity
from fedtalos.training.editing.talos import Criterion
from fedtalos.training.engine.capture import Compile
from fedtalos.training.federated.aggregation import Rule
from fedtalos.training.federated.client_sampling import Sampling
from fedtalos.training.federated.fedavg import OnBadClient
from fedtalos.training.federated.partition import Scheme
from fedtalos.training.federated.transforms import Attack

Algorithm = Literal["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "fednova"]
ADAPTIVE: tuple[Algorithm, ...] = ("fedadagrad", "fedadam", "fedyogi")
LOOKS_AT_IMAGES: tuple[Criterion, ...] = ("least_sensitive", "most_sensitive")


class RunOptions(Options):
    """The run: its name, folders, seed and device."""

    config: Annotated[Path | None, EVERYDAY, unset("FILE", "none")] = Field(
        None, description="YAML file of options; --preset and flags beat it"
    )
    preset: Annotated[str | None, EVERYDAY, unset("NAME", "none")] = Field(
        None, description="named options of configs/experiment_configs.yaml; flags beat them"
    )
    run_name: Annotated[str | None, EVERYDAY, unset("NAME", "command and time")] = Field(
        None, description="name of the run, and of its folders"
    )
    resume: Annotated[bool, EVERYDAY] = Field(
        False, description="continue the run called --run_name, or else the newest unfinished one"
    )
    resume_or_start: bool = Field(False, description="continue as --resume does, or begin where there is nothing")
    output_dir: Annotated[Path, EVERYDAY] = Field(
        Path(), description="folder for results/, checkpoints/, masks/ and plots/"
    )
    seed: Annotated[int, EVERYDAY] = Field(0, ge=0, description="seed of the random draws")
    device: Annotated[Device, EVERYDAY] = Field("auto", description=DEVICE)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="arithmetic; auto: bf16 on CUDA cards of the Ampere generation or later, fp32 elsewhere and, "
        "without TF32, for the scores of editing",
    )
    compile: Literal["auto", "on", "graph", "off"] = Field(
        "auto",
        description="steps as CUDA graphs (graph), through torch.compile too (on), or as they stand (off); auto: graph "
        "on cuda, and on where the run is long enough to pay for compiling; off elsewhere",
    )
    threads: Annotated[int | None, unset("N", "all cores, shared among the workers")] = Field(
        None, ge=1, le=1024, description="CPU threads of each process; another number changes the last bits of results"
    )
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none", description="service to log to, beside metrics.csv"
    )

    @property
    def arithmetic(self) -> Precision:
        """Precision of the run once it is settled; auto counts as fp32."""
        return "bf16" if self.precision == "bf16" else "fp32"

    @property
    def steps(self) -> Compile:
        """Tell how steps run once that is settled; auto counts as off."""
        return "off" if self.compile == "auto" else self.compile


class DataOptions(Options):
    """Images: the data set, and what is held out of it."""

    dataset: Annotated[Dataset, EVERYDAY] = Field(
        "cifar100",
        description="cifar100, cifar10, digits (needs no download), folder (a folder of images per class), csv (a "
        "table of path and label) or hf:OWNER/NAME (of the Hugging Face hub; docs/images.md)",
    )
    data_dir: Annotated[Path, EVERYDAY] = Field(
        Path("data"), description="folder that the data set is in, or is downloaded to; of csv the table itself"
    )
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images held out for validation")
    split_seed: int = Field(
        0, ge=0, description="seed that draws the validation and calibration images, apart from --seed"
    )
    calibration_fraction: float = Field(
        0.02, ge=0, lt=1, description="share of the other training images held out to calibrate masks and heads on"
    )
    train_skip: int = Field(0, ge=0, description="leave out the first N training images")
    train_limit: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="train on the first N training images only, for quick trials"
    )
    eval_limit: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="evaluate on N validation and N test images only, for quick trials"
    )
    eval_batch_size: int = Field(250, ge=1, description="images per forward pass that needs no gradients")
    cache_gb: float = Field(
        1.0, ge=0, description="GB of memory, in each process, for features of frozen blocks; a file takes the rest"
    )
    cache_dir: Annotated[Path | None, unset("DIR", "the user's cache folder")] = Field(
        None,
        description="dataset folder, csv, hf: where decoded images are kept, 20 GB of them at most (docs/images.md)",
    )


class ModelOptions(Options):
    """Model: a Vision Transformer, and the weights it starts from."""

    model_size: Annotated[
        ModelSize | None, EVERYDAY, unset("SIZE", "that of the weights; from scratch small, of digits micro")
    ] = Field(None, description="micro, tiny, small, base or large: 0.7, 5.7, 22, 86 or 303 million parameters")
    weights: Annotated[str, EVERYDAY, tyro.conf.arg(metavar="NAME|FILE")] = Field(
        "auto",
        description="pretrained (ImageNet), dino, none (from scratch), a file, a checkpoint, a timm ViT's name, "
        "hf:OWNER/REPO[/FILE], timm:NAME or torch:NAME (docs/backbones.md); auto: pretrained, for digits none",
    )
    image_size: Annotated[int | None, EVERYDAY, unset("PX", "that of the weights; from scratch 32, of digits 8")] = (
        Field(None, ge=1, le=4096, description="width and height of the images, in pixels")
    )
    patch_size: Annotated[int | None, unset("PX", "that of the weights; from scratch 4, of digits 2")] = Field(
        None, ge=1, description="width and height of a patch, in pixels"
    )
    normalisation: Literal["auto", "imagenet", "half"] = Field(
        "auto", description="mean and deviation of pixels; auto: those of the weights; half: 0.5 and 0.5"
    )
    resize: Literal["weights", "plain"] = Field(
        "weights",
        description="how images get their size: as the weights' makers resize and crop, or bilinearly and whole",
    )
    head: Annotated[str, EVERYDAY, tyro.conf.arg(metavar="NAME|FILE")] = Field(
        "auto",
        description="classifier to start with: weights (their own), random, ridge or ncm (closed form), linear "
        "(trained first) or a head file; auto: the weights' own if it fits, else the one that came with the mask, else "
        "random (for editing, --tasks and --one_shot: ridge)",
    )


class TrainOptions(Options):
    """Training: what may move, and the optimiser."""

    mask: Annotated[Path | None, EVERYDAY, unset("FILE", "none")] = Field(
        None,
        description="mask file: only its entries may move, and a new head; a head that was fitted for it comes along",
    )
    force_mask: bool = Field(False, description="accept a mask that was made on other weights")
    mask_mode: Literal["finetune", "prune"] = Field(
        "finetune", description="frozen entries keep their values (finetune), or become 0 (prune)"
    )
    trainable: Literal["all", "head", "blocks"] = Field("all", description="part that may move where there is no mask")
    freeze_head: Annotated[bool, EVERYDAY] = Field(
        False, description="keep the head as it starts; under a mask a fitted head is kept anyway"
    )
    train_head: bool = Field(False, description="let a fitted head move under a mask, too")
    save_vector: bool = Field(
        False, description="write what the run changed, as a task vector under vectors/ (docs/editing.md)"
    )
    optimizer: Annotated[Literal["sgd", "adamw"], EVERYDAY] = Field("adamw", description="optimiser: adamw or sgd")
    learning_rate: Annotated[
        float | None,
        EVERYDAY,
        unset("X", "1e-4; 1e-3 with a mask or from scratch; ten times that for sgd"),
    ] = Field(None, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.01, ge=0, description="weight decay: decoupled in adamw, L2 in sgd")
    batch_size: Annotated[int, EVERYDAY] = Field(64, ge=1, description="images per step")
    augmentation: Literal["auto"] | Augmentation = Field(
        "auto", description="random changes of images; auto: crop_flip, none for digits or where only the head moves"
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="largest norm of a gradient, over the entries that move; None: no clipping"
    )
    schedule: Literal["constant", "cosine", "step"] = Field(
        "cosine", description="course of the learning rate over the run"
    )
    warmup: int = Field(0, ge=0, description="epochs or rounds over which the learning rate first rises")
    step_every: int = Field(30, ge=1, description="schedule step: epochs or rounds between two steps")
    step_gamma: float = Field(0.1, gt=0, le=1, description="schedule step: factor on the learning rate at each step")
    final_rate: float = Field(
        0.0, ge=0, le=1, description="schedule cosine: share of the peak learning rate that it ends at"
    )
    eval_every: Annotated[int | None, unset("N", "1 epoch, 10 rounds")] = Field(
        None, ge=1, description="epochs or rounds from one validation and checkpoint to the next"
    )
    early_stop: Annotated[int | None, unset("N", "none")] = Field(
        None, ge=1, description="end the run when N validations, one after another, brought no better accuracy"
    )
    head_rounds: Annotated[int | None, unset("N", "100 rounds, 10 epochs")] = Field(
        None, ge=1, description="head linear: rounds (centralized: epochs) that train the head alone, before the run"
    )
    head_learning_rate: Annotated[float | None, unset("X", "0.1")] = Field(
        None, gt=0, description="head linear: peak learning rate while it is trained alone, by SGD"
    )


class SplitOptions(Options):
    """Clients: how many, and the training images that each holds."""

    num_clients: Annotated[int, EVERYDAY] = Field(100, ge=1, description="K, number of clients")
    partition: Annotated[Scheme, EVERYDAY] = Field(
        "iid",
        description="how the images are shared out: alike (iid), few classes each (label_skew), unequal shares of each "
        "class (dirichlet), unequal numbers (quantity), or as the data name clients (given), however many they are",
    )
    classes_per_client: Annotated[int, EVERYDAY] = Field(
        5, ge=1, description="label_skew: Nc, number of classes that each client holds"
    )
    alpha: Annotated[float, EVERYDAY] = Field(
        0.3, gt=0, description="dirichlet, quantity: concentration; smaller is more unequal"
    )
    min_client_size: int = Field(10, ge=1, description="dirichlet, quantity: fewest images that a client holds")


class FederationOptions(Options):
    """Rounds of federated averaging."""

    num_rounds: Annotated[int, EVERYDAY] = Field(100, ge=1, description="number of rounds")
    client_fraction: Annotated[float, EVERYDAY] = Field(
        0.1, gt=0, le=1, description="C, share of the clients that train in a round"
    )
    client_sampling: Sampling = Field(
        "uniform",
        description="clients of a round: a fixed number (uniform), or each with probability C (poisson), for which "
        "differential privacy has a smaller epsilon",
    )
    local_steps: Annotated[int, EVERYDAY] = Field(4, ge=1, description="J, optimiser steps of each client in a round")
    local_epochs: Annotated[int | None, unset("N", "none; 1 with --one_shot")] = Field(
        None, ge=1, description="passes of each client over its own images in a round, instead of --local_steps"
    )
    clients_at_once: Annotated[int | None, unset("V", "1; on cuda by sizes")] = Field(
        None, ge=1, description="clients that train together in one stack: the same results up to rounding"
    )
    workers: int = Field(
        1, ge=1, le=1024, description="processes that share a round's clients, each with its part of cores or its GPU"
    )


class AlgorithmOptions(Options):
    """Algorithm: FedAvg, or one that goes beyond it."""

    algorithm: Annotated[Algorithm, EVERYDAY] = Field(
        "fedavg", description="what clients and server do; docs/method.md has the formulas"
    )
    prox_mu: float = Field(0.01, ge=0, description="fedprox: pull of each client towards the global model")
    server_learning_rate: Annotated[float | None, unset("X", "1e-3 for fedadagrad, fedadam and fedyogi, else 1")] = (
        Field(None, gt=0, description="server's learning rate, of all but fedavg, fedprox and fednova")
    )
    server_momentum: Annotated[float | None, unset("X", "0.9; 0 for fedadagrad")] = Field(
        None, ge=0, lt=1, description="fedavgm: server's momentum; fedadagrad, fedadam, fedyogi: beta1"
    )
    server_beta2: float = Field(0.99, ge=0, lt=1, description="fedadam, fedyogi: memory of squared updates")
    server_tau: float = Field(
        1e-3, gt=0, description="fedadagrad, fedadam, fedyogi: updates far below it are not scaled up"
    )


class AggregationOptions(Options):
    """Aggregation: robust against attackers, or private (docs/robustness.md)."""

    aggregation: Literal["mean"] | Rule = Field(
        "mean", description="how the server joins updates; all but mean withstand attackers"
    )
    byzantine: int = Field(1, ge=0, description="trimmed_mean, krum, multi_krum: f, attackers in a round to withstand")
    max_update_norm: Annotated[float | None, unset("X", "none")] = Field(
        None, gt=0, description="S, largest 2-norm of an update; longer ones are scaled down"
    )
    attack: Literal["none"] | Attack = Field(
        "none", description="simulated attack: attackers send -1, -100 or NaN times their update"
    )
    attackers: int = Field(0, ge=0, description="number of clients that attack, drawn at random")
    dp_noise: Annotated[float | None, unset("X", "none")] = Field(
        None,
        ge=1e-6,
        le=1000,
        description="differential privacy: z, for Gaussian noise of deviation z S on the sum of updates",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=1, description="differential privacy: delta of the reported epsilon; well below 1/K"
    )


class FailureOptions(Options):
    """Failures: clients that diverge, drop out or come late."""

    on_bad_client: OnBadClient = Field(
        "stop", description="what to do when a client diverges: stop the run, or leave it out of the round"
    )
    dropout_rate: float = Field(0.0, ge=0, lt=1, description="chance that a client of a round sends nothing back")
    slowest: float = Field(
        1.0,
        ge=1,
        le=1e6,
        description="how slow clients may be: a step takes 1 to X times the fastest client's, drawn once for each",
    )
    deadline: Annotated[float | None, unset("STEPS", "none")] = Field(
        None, gt=0, description="when a round stops waiting for clients, in steps of the fastest one"
    )


class PersonalOptions(Options):
    """Clients one by one: the final model tested, and fine-tuned, for each."""

    client_evaluation: bool = Field(
        False, description="report test accuracy by client, weighted by the classes it holds"
    )
    personalise_steps: int = Field(
        0, ge=0, description="fine-tune the final model for each client by N steps, and test again"
    )
    personalise_clients: Annotated[int | None, unset("M", "all")] = Field(
        None, ge=1, description="personalise for M clients only, drawn at random"
    )
    personalise_alpha: float = Field(
        1.0, ge=0, description="factor on a client's own vector, which its model adds to the final one; 1: fine-tuned"
    )


class EditingOptions(Options):
    """Mask: which entries may move, and how they are chosen."""

    checkpoint: Annotated[Path | None, EVERYDAY, unset("RUN|FILE", "start from --weights")] = Field(
        None, description="trained run, or file under checkpoints/, to edit with its head"
    )
    target_sparsity: Annotated[float, EVERYDAY] = Field(
        0.9, ge=0, lt=1, description="share of the eligible entries that stay frozen"
    )
    num_iterations: Annotated[int, EVERYDAY] = Field(4, ge=1, description="R, rounds of scoring and excluding")
    criterion: Annotated[
        Criterion,
        EVERYDAY,
        tyro.conf.arg(metavar="NAME"),
        BeforeValidator(lambda value: "least_sensitive" if value == "talos" else value),
    ] = Field("least_sensitive", description="entries that may move; least_sensitive is TaLoS, and talos works too")
    eligible: Eligible = Field(
        "blocks",
        description="entries to choose among: all in the blocks, attention's, its q and k, biases, or as the paper's "
        "code all in the blocks, the patch convolution and the last norm",
    )
    granularity: Granularity = Field("entry", description="what moves or freezes together; coarser trains faster")
    soft_zero: float = Field(0.01, gt=0, le=1, description="factor on excluded entries while the others are scored")
    fisher: Annotated[FisherMode, BeforeValidator(lambda value: "true" if value is True else value)] = Field(  # YAML
        "true",
        description="labels of the scores: drawn from the model (true), every class by its probability (exact), the "
        "data's (empirical); batch: summed gradients squared, a common error, to compare",
    )
    fisher_samples: int = Field(1, ge=1, description="fisher true: labels drawn per image")
    fisher_chunk: Annotated[int | None, unset("N", "as fits the memory; at most 16 on cpu")] = Field(
        None, ge=1, description="images per backward pass of the scores"
    )
    calibration_images: int = Field(
        640,
        ge=1,
        description="images scored per iteration, at most, by all clients together; each client scores at least one",
    )
    calibration: Annotated[Literal["central", "federated"], EVERYDAY] = Field(
        "central", description="images to score: the calibration split, or every client's own training images"
    )
    calibration_clients: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=1, description="calibration federated: only N clients score, drawn at random"
    )
    calibration_client: Annotated[int | None, unset("N", "all")] = Field(
        None, ge=0, description="calibration federated: only client N scores, for a mask of its own"
    )


class Config(Options):
    """Options that all training commands share."""

    command: ClassVar[str]
    idle: ClassVar[tuple[str, ...]] = ()
    """Options of its sections that the command has no use for."""

    run: RunOptions = RunOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()


class CentralizedConfig(Config):
    """Train on all images in one place: the baseline."""

    command: ClassVar[str] = "centralized"

    num_epochs: Annotated[int, EVERYDAY] = Field(100, ge=1, description="passes over the training images")
    train: TrainOptions = TrainOptions()


class FederatedConfig(Config):
    """Train by federated averaging over clients that keep their images."""

    command: ClassVar[str] = "federated"

    federation: FederationOptions = FederationOptions()
    split: SplitOptions = SplitOptions()
    apart: ApartOptions = ApartOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    train: TrainOptions = TrainOptions()
    aggregation: AggregationOptions = AggregationOptions()
    failures: FailureOptions = FailureOptions()
    personal: PersonalOptions = PersonalOptions()


class ContinualConfig(FederatedConfig):
    """Train federatedly on one task after another (--tasks T); compare with tasks that train apart and are merged."""

    command: ClassVar[str] = "continual"
    idle: ClassVar[tuple[str, ...]] = ("one_shot", "merge", "leave_out", *PersonalOptions.model_fields)


class EditingConfig(Config):
    """Make a TaLoS mask: score the weights on calibration images, let the least sensitive move."""

    command: ClassVar[str] = "editing"
    idle: ClassVar[tuple[str, ...]] = ("tracker",)

    editing: EditingOptions = EditingOptions()
    split: SplitOptions = SplitOptions()


RunConfig = CentralizedConfig | FederatedConfig | EditingConfig
RUN_CONFIGS: dict[str, type[RunConfig]] = {
    c.command: c for c in (CentralizedConfig, FederatedConfig, ContinualConfig, EditingConfig)
}
