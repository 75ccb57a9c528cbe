"""Flower's client, in a module of its own: so actors import it and keep what it caches from client to client."""

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Settings, client_batches, client_size, freeze, loss, make_model, make_optimizer, moving
from torch import nn


def client_app(settings: Settings, threads: int) -> ClientApp:
    """Trains one client per message, on ``threads`` threads; only what moves comes and goes."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        model = resident_model(settings, threads)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        parameters = moving(model)
        optimizer = make_optimizer(list(parameters.values()), settings)
        for pixels, labels in client_batches(settings, client):
            optimizer.zero_grad()
            loss(model, pixels, labels, settings).backward()
            optimizer.step()
        arrays = ArrayRecord({name: parameter.detach() for name, parameter in parameters.items()})
        size = MetricRecord({"num-examples": client_size(settings, client)})
        return Message(RecordDict({"arrays": arrays, "metrics": size}), reply_to=message)

    return app


@cache
def resident_model(settings: Settings, threads: int) -> nn.Module:
    """The model of this actor's process."""
    torch.set_num_threads(threads)
    model = make_model(settings)
    freeze(model, settings)
    return model
