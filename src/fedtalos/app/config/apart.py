"""Options of runs whose clients, or tasks, train apart and are merged once."""

from typing import Annotated, Literal

import tyro
from pydantic import Field

from fedtalos.app.config.options import EVERYDAY, Options, unset
from fedtalos.data.class_groups import GroupOrder
from fedtalos.training.editing.merging import Method

Factor = Annotated[Literal["auto"] | float, tyro.conf.arg(metavar="auto|X")]
"""A factor on a vector."""


class ApartOptions(Options):
    """Tasks and one round: vectors train apart and are merged (docs/editing.md)."""

    tasks: Annotated[int | None, EVERYDAY, unset("T", "none")] = Field(
        None, ge=1, description="put the classes into T groups; each group's clients train apart and give one vector"
    )
    task_order: GroupOrder = Field(
        "fixed",
        description="classes of a task: neighbours as they are stored (fixed), drawn (random), or whole superclasses "
        "of CIFAR-100 (superclass)",
    )
    local_classes: Literal["task", "all"] = Field(
        "task", description="outputs that count while a client trains: those of its task's classes, or all"
    )
    one_shot: Annotated[bool, EVERYDAY] = Field(
        False, description="train every client (with --tasks: every task) once, from the same start, and merge them"
    )
    merge: Annotated[Method, tyro.conf.arg(metavar="RULE")] = Field(
        "sum",
        description="how vectors become one: sum, mean (by images), ties, dare, magmax, consensus, lines, fisher or "
        "regmean (by sums over the clients' images), tsv, iso_c",
    )
    merge_alpha: Factor = Field(
        "auto", description="factor on the merged vector; auto: by accuracy on the validation images"
    )
    refit_head: bool = Field(
        True, description="fit the head anew, from all clients' sums over the merged model's features"
    )
    leave_out: Annotated[tuple[int, ...], unset("N [N ...]", "none")] = Field(
        (), description="numbers of tasks, or of clients, that take no part: what forgetting is measured against"
    )

    @property
    def asked(self) -> bool:
        """True where something trains apart."""
        return self.one_shot or self.tasks is not None
