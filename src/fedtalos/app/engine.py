"""Choosing how steps run: how many clients train in one stack, and whether as CUDA graphs and through torch.compile.

All of it follows from sizes and from the card, never from a stopwatch, so that two runs of one seed compute the same.
"""

import os
from dataclasses import replace
from typing import TypeVar

from fedtalos.app.config.rounds import rounds_of
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.data.folder_cache import cache_folder
from fedtalos.devices import same_numbers_on_cuda, total_memory
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.notes import note
from fedtalos.training.engine.batches import stages_passed
from fedtalos.training.engine.capture import Compile
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters

ConfigT = TypeVar("ConfigT", CentralizedConfig, FederatedConfig)

WORK_THAT_PAYS = 9e11
"""Images x tokens x width x blocks of a run that pays for torch.compile's 54 s, the first time.

A compiled step saved 62 and 69 ps of each on an H200, in bf16 (benchmarks/results/gpu_h200.md).
"""
SHARE_OF_MEMORY = 0.6
"""Part of the device's memory that a stack may be expected to take."""
BYTES_OF_ACTIVATIONS = {"fp32": 76, "bf16": 64}
"""Bytes that a step keeps for its backward pass, per image, token, width and block: the most that autograd kept."""
BYTES_OF_STATE = 32
"""Bytes per entry that moves of a client: its value and gradient, AdamW's two moments, and copies while it captures."""


def with_engine(loaded: Loaded[ConfigT], moving: MaskedParameters, local: LocalTraining) -> Loaded[ConfigT]:
    """Settle --compile and --clients_at_once; what was chosen for the user on CUDA is noted.

    Raises InputError where another library's model is to be stacked.
    """
    config, model = loaded.config, moving.model
    work = images_of(config, len(loaded.data.train), local) * work_an_image(model, stages_passed(moving, local))
    way = way_of(config.run.compile, model, moving.device.type, work)
    config = config.model_copy(update={"run": config.run.model_copy(update={"compile": way})})
    size = 1
    if isinstance(config, FederatedConfig):
        size = clients_at_once(config, moving, local)
        federation = config.federation.model_copy(update={"clients_at_once": size})
        config = config.model_copy(update={"federation": federation})
    if way == "on":
        # What inductor makes is kept from run to run; its own place is emptied when the machine starts anew.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder().with_name("compiled")))
    if way != "off":
        steps = {"on": "through torch.compile", "graph": "as they stand"}[way]
        graphs = " and as CUDA graphs" if moving.device.type == "cuda" else ""
        stack = f", {size} clients in a stack" if size > 1 else ""
        note("engine", f"steps run {steps}{graphs}{stack} (--compile {way})")
    return replace(loaded, config=config)


def way_of(asked: str, model: Backbone, device: str, work: float) -> Compile:
    """Settle --compile: auto is off but on CUDA; there graph, and on where the run's ``work`` pays for it."""
    on_cuda = device == "cuda"
    if not isinstance(model, VisionTransformer):
        if on_cuda:
            same_numbers_on_cuda(strict=False)  # an operation of theirs may have no deterministic algorithm
        if asked != "off" and (on_cuda or asked != "auto"):
            note("engine", f"{model.architecture} is not ours: its steps run as they stand, one client at a time")
        return "off"
    if asked == "off" or (asked == "auto" and not on_cuda):
        return "off"
    if asked == "graph" and not on_cuda:
        note("engine", f"there are no CUDA graphs on {device}: steps run as they stand")
        return "off"
    return "on" if asked == "on" or (asked == "auto" and work >= WORK_THAT_PAYS) else "graph"


def way_of_scores(config: EditingConfig, model: Backbone, device: str) -> Compile:
    """Settle --compile for Fisher scores, which are never compiled."""
    way = way_of(config.run.compile, model, device, 0.0)
    return "graph" if way == "on" and device == "cuda" else way


def clients_at_once(config: FederatedConfig, moving: MaskedParameters, local: LocalTraining) -> int:
    """Settle how many clients train in one stack: as asked, else 1, but on CUDA as many as can be.

    Where a round's clients do not fit, they are stacked in groups of about one size.
    """
    asked, model, federation = config.federation.clients_at_once, moving.model, config.federation
    ours = isinstance(model, VisionTransformer)
    if asked is not None:
        if asked > 1 and not ours:
            raise InputError(f"--clients_at_once {asked}: {model.architecture} cannot be stacked; leave it out")
        return asked
    if not ours or moving.device.type != "cuda":
        return 1
    per_round = -(-rounds_of(config).at_once // federation.workers)
    kept = local.batch_size * work_an_image(model, stages_passed(moving, local)) * BYTES_OF_ACTIVATIONS[local.precision]
    fit = max(1, int(SHARE_OF_MEMORY * total_memory(moving.device) / (kept + BYTES_OF_STATE * len(moving))))
    return -(-per_round // -(-per_round // fit))


def work_an_image(model: Backbone, passed: int) -> float:
    """Tokens x width x blocks that an image has yet to go through after the first ``passed`` stages."""
    if not isinstance(model, VisionTransformer):
        return 0.0
    tokens, width = model.patch_embed.grid**2 + 1 + model.architecture.registers, model.pos_embed.shape[-1]
    return float(tokens * width * (len(model.blocks) - max(0, passed - 1)))


def images_of(config: CentralizedConfig | FederatedConfig, images: int, local: LocalTraining) -> float:
    """Images that a run trains on, of ``images`` that there are; each as often as it comes."""
    if isinstance(config, CentralizedConfig):
        return float(config.num_epochs * images)
    rounds = rounds_of(config)
    of_client = local.steps_for(images // config.split.num_clients) * local.batch_size
    return float(rounds.total * rounds.clients * of_client)
