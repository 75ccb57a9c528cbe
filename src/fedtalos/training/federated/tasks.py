"""Tasks: groups of classes, each with clients of its own, who hold all images of its classes and no others.

Letters: K clients, T tasks.
"""

import numpy as np

from fedtalos.data.class_groups import Groups, group_of
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.randomness import generator
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.partition import Scheme, split_clients


def clients_of_tasks(num_clients: int, tasks: int) -> tuple[range, ...]:
    """Give each of T tasks its share of K clients, neighbours; shares differ by one at most.

    Raises InputError for fewer clients than tasks.

    >>> clients_of_tasks(5, 2)
    (range(0, 3), range(3, 5))
    """
    if not 1 <= tasks <= num_clients:
        raise InputError(
            f"num_clients {num_clients} with {tasks} tasks: every task needs a client; take {tasks} clients or more"
        )
    parts = np.array_split(np.arange(num_clients), tasks)
    return tuple(range(int(part[0]), int(part[-1]) + 1) for part in parts)


def split_by_task(
    images: LabelledImages,
    num_clients: int,
    groups: Groups,
    scheme: Scheme = "iid",
    *,
    seed: int = 0,
    classes_per_client: int = 5,
    alpha: float = 0.3,
    min_client_size: int = 10,
) -> Clients:
    """Share each task's images among that task's clients (``clients_of_tasks``), as ``split_clients`` shares them.

    ``groups`` are the classes of each task (``class_groups``); every class with images is to be in one.

    Raises InputError where no such split exists.

    >>> clients = split_by_task(data.train, 10, class_groups(data.classes, 5))
    """
    if scheme == "given":
        raise InputError("partition given: a task has clients of its own, which the data do not name; draw a split")
    labels = images.labels.cpu().numpy()
    task = group_of(groups, int(labels.max()) + 1)[labels]
    if (task < 0).any():
        raise InputError(f"groups: class {labels[task < 0][0]} is in none; give every class a group")
    owner = np.empty(len(labels), np.int64)
    for number, clients in enumerate(clients_of_tasks(num_clients, len(groups))):
        own = np.flatnonzero(task == number)
        try:
            part = split_clients(
                images.subset(own),
                len(clients),
                scheme,
                seed=int(generator(seed, "task", number).integers(2**31)),
                classes_per_client=classes_per_client,
                alpha=alpha,
                min_client_size=min_client_size,
            )
        except InputError as error:
            raise InputError(f"task {number} of {len(groups)}: {error}") from error
        owner[own] = clients.start + part.owner.astype(np.int64)
    return Clients.of(images, owner, num_clients)
