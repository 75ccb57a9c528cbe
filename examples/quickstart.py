"""Federated rounds under a TaLoS mask, on scikit-learn's digits: seconds on a laptop, nothing to download."""

import fedtalos as ft

data = ft.load_dataset("digits", calibration_fraction=0.15)
model = ft.load_model("micro", data.classes, pretrained=False, image_size=8)
list(ft.train_centralized(model, data.calibration, local=ft.LocalTraining(batch_size=32), epochs=30))  # by the server
print(f"before: {ft.evaluate(model, data.test).accuracy:.3f}")
mask = ft.talos_mask(model, data.calibration, density=0.1)
clients = ft.split_clients(data.train, 20, "label_skew", classes_per_client=2)
local = ft.LocalTraining(steps=4, batch_size=32, learning_rate=3e-3)
for round in ft.fedavg(model, clients, mask, local=local, rounds=20, fraction=0.25):
    print(round.number, f"{round.train.accuracy:.3f}")
print(f"after: {ft.evaluate(model, data.test).accuracy:.3f}")
