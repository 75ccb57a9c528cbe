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
# # Edits that add up: task vectors
#
# Training changes a model. That change can be taken in hand: added to another one, halved, taken away again. This
# notebook trains one small Vision Transformer on two tasks apart, by two groups of clients that never meet, then adds
# up what they learned and makes the model forget one of them. It takes scikit-learn's digits, so nothing is downloaded,
# and less than a minute of one CPU. docs/editing.md tells the rest.

# %%
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fedtalos as ft

torch.set_num_threads(1)

# %% [markdown]
# ## A base
#
# Vectors add where they start from one and the same model. Ours is trained on a few images of all digits, by whoever
# publishes it. Its head is ridge regression on its features, and stays as it is from here on.

# %%
data = ft.load_dataset("digits", calibration_fraction=0.15)
base = ft.load_model("micro", data.classes, pretrained=False, image_size=8)
few = data.calibration.slice(0, 100)
for _ in ft.train_centralized(base, few, local=ft.LocalTraining(batch_size=32), epochs=20):
    pass
ft.fit_head(base, few, "ridge")
print(f"base: {ft.evaluate(base, data.test).accuracy:.3f}")

# %% [markdown]
# ## Two tasks, trained apart
#
# The first task is the digits 0 to 4, the second 5 to 9. Each has two clients, who hold all of its images and no
# others. Only a random tenth of the weights may move, the same tenth for both. While a task trains, only the outputs of
# its own classes count (`groups`), so that it does not push the others down.

# %%
tasks = ft.class_groups(data.classes, 2)
clients = ft.split_by_task(data.train, 4, tasks)
mask = ft.random_mask(base, density=0.1)
local = ft.LocalTraining(epochs=5, batch_size=32, learning_rate=3e-3, groups=tasks)

moved = {}
training = ft.train_apart(base, clients, mask, local=local, units=[range(2), range(2, 4)], keep=moved.__setitem__)
for round in training:
    print(f"clients {round.clients}: {round.train.accuracy:.3f} on their own images")

# %% [markdown]
# `train_apart` leaves the model as it was, and gives each task's change as a plain tensor. A `TaskVector` is that
# change with what one must know to use it again: of which weights it is, which entries it moves, which classes it has
# seen.

# %%
vectors = []
for number, change in moved.items():
    after = copy.deepcopy(base)
    moving = ft.MaskedParameters(after, mask)
    moving.write(moving.vector() + change)
    seen = [data.classes[label] for label in tasks[number]]
    vectors.append(ft.task_vector(base, after, mask, classes=data.classes, task=seen))
    print(f"digits {' '.join(seen)}: {len(vectors[-1])} entries move, 2-norm {vectors[-1].norm:.3f}")

# %% [markdown]
# ## Are they alike?
#
# The cosine of the two says whether they pull the same weights the same way. Near 0, they leave each other alone.

# %%
first, second = vectors
cosine = float(first.values @ second.values) / (first.norm * second.norm)
print(f"cosine: {cosine:.3f}")

# %% [markdown]
# ## Add
#
# `apply` gives a copy of the model with vectors added. Accuracy is that on each task's own test images, among all ten
# digits.

# %%
rows: dict[str, list[float]] = {}


def measure(name: str, model) -> None:
    rows[name] = ft.task_accuracy(model, data.test, tasks).unknown.tolist()
    print(f"{name:>22}: " + "  ".join(f"{accuracy:.3f}" for accuracy in rows[name]))


measure("base", base)
measure("plus the first", ft.apply(base, first))
measure("plus the second", ft.apply(base, second))
measure("plus both", ft.apply(base, first, second))

# %% [markdown]
# The sum in full is often too much of a good thing, so a factor is searched on validation images. 0 is among those that
# are tried: the result is never worse than the base, by that measure. There are other ways to make one vector of two.


# %%
def on_validation(model) -> float:
    return ft.evaluate(model, data.val).accuracy


for rule in ("sum", "mean", "ties", "magmax", "lines"):
    merged = ft.merge(vectors, rule)
    found = ft.best_alpha(base, merged, on_validation)
    measure(f"{rule} times {found.alpha:.2f}", ft.apply(base, merged, alpha=found.alpha))

# %% [markdown]
# ## A head that fits
#
# The head was made for the base's features, and adding vectors moved these. Clients can send sums over the new
# features, from which a new head follows in closed form. Nobody trains again for that. Compare with the base and such a
# head: digits are easy, and a head alone goes far. On images of your own this is the row to beat.

# %%
merged = ft.merge(vectors, "sum")
edited = ft.apply(base, merged, alpha=ft.best_alpha(base, merged, on_validation).alpha)
ft.fit_head(edited, data.train, "ridge", holders=clients, val=data.val)
measure("sum, head fitted anew", edited)
plain = copy.deepcopy(base)
ft.fit_head(plain, data.train, "ridge", holders=clients, val=data.val)
measure("base, head fitted anew", plain)

# %% [markdown]
# ## Subtract
#
# What was added can be taken away. It gives the base back, to the rounding of float32.

# %%
there = ft.apply(base, first)
back = ft.apply(there, -first)
error = max(float((p - q).detach().abs().max()) for p, q in zip(base.parameters(), back.parameters(), strict=True))
print(f"largest difference from the base: {error:.1e}")

# %% [markdown]
# ## Forget
#
# Taking a vector away from a model that learned both tasks makes it forget one. `forget` searches how much of it to
# subtract: as little of the target as possible, while the others keep 95 % of their accuracy.


# %%
def of_task(images, number: int):
    return images.subset(torch.isin(images.labels, torch.tensor(tasks[number])).nonzero().squeeze(1))


forgetful = ft.forget(edited, second, of_task(data.val, 1), of_task(data.val, 0))
measure(f"less the second x {forgetful.alpha:.2f}", forgetful.model)

# %% [markdown]
# ## One round
#
# `one_shot` does the whole of it: every client trains once, vectors go up and are summed, the factor is chosen, the
# head is fitted from sums. It counts what is sent, too.

# %%
model = copy.deepcopy(base)
once = ft.one_shot(model, clients, mask, local=local, val=data.val, units=[range(2), range(2, 4)])
measure("one round", model)
print(f"alpha {once.alpha:.2f}, {once.bytes_up / 1e6:.1f} MB up, {once.bytes_down / 1e6:.1f} MB down")

# %% [markdown]
# ## A picture

# %%
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
places = torch.arange(len(rows))
for number, (task, offset) in enumerate((("digits 0 to 4", -0.2), ("digits 5 to 9", 0.2))):
    axes.barh(places + offset, [row[number] for row in rows.values()], height=0.4, label=task)
axes.set_yticks(places, labels=list(rows))
axes.invert_yaxis()
axes.set(xlabel="test accuracy, among all ten digits", xlim=(0, 1))
axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
Path("plots").mkdir(exist_ok=True)
figure.savefig("plots/task_vectors.png", dpi=150)
