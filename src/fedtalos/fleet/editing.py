"""Make a mask over a fleet: the edit of ``editing --calibration federated``, its scores from nodes' own images."""

from dataclasses import replace

import numpy as np
from rich.console import Console

from fedtalos.app.config.schema import EditingConfig
from fedtalos.app.edit import Edit, finish, refine_mask, scoring_clients
from fedtalos.app.load import Loaded, load
from fedtalos.app.run.beginning import introduction_to_edit
from fedtalos.app.run.books import Books
from fedtalos.app.run.display import Display, say, say_facts
from fedtalos.app.run.folders import begun, open_run
from fedtalos.fleet.calibration import ScoresOfNodes, refuse_what_asks_no_client
from fedtalos.fleet.gathering import Terms, clients_of_sizes, gather, members_of
from fedtalos.fleet.post import Post
from fedtalos.fleet.questions import fit_head_from_sums
from fedtalos.models.heads import closed_form, save_head
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.ranking import entries_kept, group_entries
from fedtalos.training.editing.sensitivity import chunk_that_fits, draw_holders
from fedtalos.training.editing.talos import refuse_untrained_head
from fedtalos.training.federated.clients import Clients
from fedtalos.training.masked_parameters import MaskedParameters, head_mask


def run(config: EditingConfig, post: Post, terms: Terms, console: Console) -> None:
    """Make a mask with the nodes that the post reaches; it is that of a simulation, bit for bit.

    Raises InputError for an edit that asks no client, and where a node that is to score does not.
    """
    refuse_what_asks_no_client(config)
    with begun(config, console) as paths:
        loaded = load(config)
        # What moves is told anew: the head alone, where it is fitted.
        moving = MaskedParameters(loaded.model, head_mask(loaded.model), features=loaded.features)
        members = members_of(config, post, terms, console)
        everyone = replace(terms, min_nodes=config.split.num_clients)
        gather(loaded, moving, paths.name, members, everyone)
        edit = prepare(loaded, clients_of_sizes(loaded, members.sizes))
        config, options = edit.loaded.config, edit.loaded.config.editing
        open_run(config, paths, loaded.origin(), console)
        scored = sum(len(holder.ids) for holder in edit.holders)
        say_facts(console, introduction_to_edit(edit.loaded, len(edit.eligible), len(edit.holders), scored))
        if kind := closed_form(config.model.head):
            say(console, f"fitting the {kind} head from clients' sums")
            fit_head_from_sums(loaded, moving, members, kind)
            save_head(paths.head, loaded.model)
        books = Books(paths, edit.eligible, edit.groups, 0, (0, 0), members.bytes_since)
        score = ScoresOfNodes(config, moving, edit.eligible, edit.holders, members)
        with Display(console, "iteration", options.num_iterations, books.done) as display:
            refine_mask(edit, score, books, display)
        finish(edit, paths, books, console)
        say(console, f"train with it: add 'mask: {paths.mask}' to the fleet's app/config.yaml, and run again")


def prepare(loaded: Loaded[EditingConfig], clients: Clients) -> Edit:
    """Settle what is chosen among, and who scores how many images; ``clients`` are known by their sizes alone."""
    config, options = loaded.config, loaded.config.editing
    if closed_form(config.model.head) is None:
        refuse_untrained_head(loaded.model)
    eligible = eligible_entries(loaded.model, options.eligible)
    entries_kept(1 - options.target_sparsity, len(eligible))
    chunk = options.fisher_chunk or chunk_that_fits(loaded.model, loaded.data.train)
    options = options.model_copy(update={"fisher_chunk": chunk})
    holders = [
        replace(holder, ids=np.arange(clients.sizes[holder.number])) for holder in scoring_clients(config, clients)
    ]
    return Edit(
        replace(loaded, config=config.model_copy(update={"editing": options})),
        eligible,
        group_entries(eligible, options.granularity, loaded.model.architecture),
        clients,
        draw_holders(holders, options.calibration_images, config.run.seed),
    )
