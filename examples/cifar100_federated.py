# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CIFAR-100 among a hundred clients, with a tenth of the weights
#
# A Vision Transformer that was trained on ImageNet learns CIFAR-100 from a hundred clients, each of which holds five
# of the hundred classes. All of its blocks may move, or a tenth of their weights: the tenth that TaLoS finds, or
# one drawn at random. Which learns more, and what does it send?
#
# By default this downloads CIFAR-100 (about 160 MB) and a ViT-Ti/16 (23 MB), and takes its time on two CPU cores. The
# next cell, or environment variables of the same names, make it smaller or larger.

# %%
import copy
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fedtalos as ft

DATASET = os.environ.get("DATASET", "cifar100")  # or cifar10, digits
MODEL = os.environ.get("MODEL", "tiny")  # or small, dino, a file, ...; micro is drawn at random, for quick trials
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", "64"))  # pixels a side; 224 wants an accelerator
ROUNDS = int(os.environ.get("ROUNDS", "10"))
DATA_DIR = os.environ.get("DATA_DIR", "data")

# %% [markdown]
# ## Images, model, clients
#
# The new head is ridge regression on the model's features, in closed form. Each client sends sums of its images once,
# which add up to those of all images. So the head knows all classes before the first round, and it stays as it is.

# %%
data = ft.load_dataset(DATASET, DATA_DIR)
model = ft.load_model(MODEL, data.classes, image_size=IMAGE_SIZE, pretrained=MODEL != "micro")
clients = ft.split_clients(data.train, 100, "label_skew", classes_per_client=5)
val = data.val.slice(0, 2000)
print(f"{len(clients)} clients with about {len(data.train) // len(clients)} images each")
ft.fit_head(model, data.train, "ridge", holders=clients, val=val)
print(f"before training: {ft.evaluate(model, data.test).accuracy:.3f}")

# %% [markdown]
# ## What may move
#
# A mask maps names of parameters to tensors of True (may move) and False (frozen). Parameters that it does not name
# are frozen, here the head. TaLoS scores `data.calibration`, images that no client holds. Each choice has the learning
# rate that suited it best in docs/results.md.

# %%
body = {
    name: torch.ones_like(parameter, dtype=torch.bool)
    for name, parameter in model.named_parameters()
    if not name.startswith("head.")
}
choices = {
    "everything": (body, 3e-4),
    "TaLoS, 10 %": (ft.talos_mask(model, data.calibration, density=0.1, max_images=640), 3e-3),
    "random, 10 %": (ft.random_mask(model, density=0.1), 3e-3),
}
shared = ft.overlap(choices["TaLoS, 10 %"][0], choices["random, 10 %"][0])
print(f"overlap of the two masks: {shared:.3f}")

# %% [markdown]
# ## The rounds
#
# In each round ten clients train for eight steps from the same weights, and the server takes their mean. All three
# start from the same model and see the same clients and batches.

# %%
start = copy.deepcopy(model.state_dict())
curves: dict[str, list[float]] = {}
megabytes: dict[str, list[float]] = {}
for name, (mask, rate) in choices.items():
    model.load_state_dict(start)
    moving = ft.MaskedParameters(model, mask)
    local = ft.LocalTraining(
        steps=8,
        batch_size=32,
        learning_rate=ft.Schedule(rate, total=ROUNDS),
        augmentation="none" if DATASET == "digits" else "crop_flip",
    )
    curves[name], megabytes[name] = [ft.evaluate(model, val).accuracy], [0.0]
    for round in ft.fedavg(moving, clients, local=local, rounds=ROUNDS, fraction=0.1):
        curves[name].append(ft.evaluate(model, val).accuracy)
        sent = 2 * len(round.clients) * moving.nbytes  # down and up
        megabytes[name].append(megabytes[name][-1] + sent / 1e6)
    test = ft.evaluate(model, data.test).accuracy
    print(f"{name}: test {test:.3f}, {megabytes[name][-1]:.0f} MB sent")

# %% [markdown]
# ## Two pictures

# %%
figure, (by_round, by_bytes) = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for name, curve in curves.items():
    by_round.plot(curve, label=name)
    by_bytes.plot(megabytes[name], curve, label=name)
by_round.set(xlabel="round", ylabel="validation accuracy")
by_bytes.set(xlabel="megabytes sent, down and up")
by_round.legend(frameon=False)
Path("plots").mkdir(exist_ok=True)
figure.savefig("plots/cifar100_federated.png", dpi=150)

# %% [markdown]
# ## What came out
#
# With the numbers above, a ViT-Ti/16 with ImageNet weights from a file, one seed, and 14 minutes of one CPU thread:
#
# | may move | test accuracy | MB sent |
# |---|---|---|
# | nothing: the ridge head | 0.286 | |
# | everything | 0.418 | 4392 |
# | TaLoS, 10 % | 0.353 | 427 |
# | random, 10 % | 0.412 | 427 |
#
# A random tenth learns nearly as much as everything, for a tenth of the bytes. docs/results.md has three seeds, other
# splits and other rates.
