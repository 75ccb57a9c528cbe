"""Holders of a run's images, as units that train apart ask them: in this process, or each on its own machine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.federation import engine_of
from fedtalos.app.load import Loaded
from fedtalos.models.heads import ClosedForm, HeadSums
from fedtalos.training.editing.fisher import fisher_scores, scored_batches
from fedtalos.training.editing.merging_by_data import input_moments
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Engine
from fedtalos.training.federated.stacked import Kept
from fedtalos.training.head_fitting import holder_sums
from fedtalos.training.local_training import Watch
from fedtalos.training.masked_parameters import MaskedParameters

MergeWeights = dict[str, Tensor]
"""Parameter name -> numbers that a rule weighs a unit's values by: sums over its clients' images, so they add up."""
WeighedBy = Literal["fisher", "regmean"]
"""Rules of merging that ask clients for weights."""


class Holders(Protocol):
    """Clients that train, and sum over their images, where the images are."""

    @property
    def clients(self) -> Clients:
        """The clients, by their numbers of images; where they are in this process, with the images."""
        ...

    def classes(self, client: int) -> tuple[int, ...]:
        """Classes that a client holds images of, ascending."""
        ...

    def engine(self, watch: Watch) -> Engine:
        """Make the engine of ``train_apart``."""
        ...

    def head_sums(self, clients: Sequence[int], kind: ClosedForm) -> Iterator[tuple[int, HeadSums]]:
        """Sum each client's features, as the model makes them now, against its labels; those away are left out."""
        ...

    def weights(self, rule: WeighedBy, models: Iterable[tuple[int, Tensor]]) -> Iterator[MergeWeights]:
        """Make a rule's weights for each client, under a model of its own: the one here with these values (A,)."""
        ...

    def sent(self, counted: tuple[int, int]) -> tuple[int, int]:
        """Bytes down and up since this was last asked; ``counted`` are those of a simulation, which sends nothing."""
        ...


class LocalHolders:
    """Clients whose images are in this process.

    >>> holders = LocalHolders(loaded, clients, moving)
    >>> holders.classes(0)
    (2, 5, 7)
    """

    def __init__(self, loaded: Loaded[FederatedConfig], clients: Clients, moving: MaskedParameters) -> None:
        self.loaded, self.clients, self.moving = loaded, clients, moving
        self._labels = clients.images.labels.cpu().numpy()

    def classes(self, client: int) -> tuple[int, ...]:
        return tuple(sorted(set(self._labels[self.clients[client]].tolist())))

    def engine(self, watch: Watch) -> Engine:
        return engine_of(self.loaded.config, watch, Kept())

    def head_sums(self, clients: Sequence[int], kind: ClosedForm) -> Iterator[tuple[int, HeadSums]]:
        loaded, ids = self.loaded, (self.clients[client] for client in clients)
        return zip(clients, holder_sums(loaded.model, loaded.data.train, ids, kind, loaded.features), strict=True)

    def weights(self, rule: WeighedBy, models: Iterable[tuple[int, Tensor]]) -> Iterator[MergeWeights]:
        of_client: dict[WeighedBy, Callable[[int], MergeWeights]] = {"fisher": self._scores, "regmean": self._moments}
        for client, values in models:
            self.moving.write(values)
            yield of_client[rule](client)

    def sent(self, counted: tuple[int, int]) -> tuple[int, int]:
        return counted

    def _scores(self, client: int) -> MergeWeights:
        model, ids, seed = self.loaded.model, self.clients[client], self.loaded.config.run.seed
        masks = {name: mask for name, mask in self.moving.entries.masks.items() if has_scores(model, name)}
        return fisher_scores(model, scored_batches(model, self.loaded.data.train, ids, seed=seed), masks)

    def _moments(self, client: int) -> MergeWeights:
        return input_moments(self.loaded.model, self.loaded.data.train.subset(self.clients[client]))


def weights_sent(moving: MaskedParameters, rule: WeighedBy) -> dict[str, int]:
    """Count the numbers that a client sends for a rule, by name of the parameter: what it scores, or inputs of layers.

    >>> 4 * sum(weights_sent(moving, "fisher").values())  # bytes
    """
    model, masks = moving.model, moving.entries.masks
    if rule == "fisher":
        return {name: int(mask.sum()) for name, mask in masks.items() if has_scores(model, name)}
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in masks if name.endswith(".weight")}
    return {name: layer.in_features for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def has_scores(model: nn.Module, name: str) -> bool:
    """True for parameters that have Fisher scores; embeddings have none, and are averaged."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.LayerNorm | nn.Conv2d)
