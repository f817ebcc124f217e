"""Subspaces found by distributed alignment search, with the controls that show what they are worth.

    pairs = [("The capital of France is", "The capital of Italy is", " Rome"), …]
    fit = hk.fit_subspace(lm, pairs, "resid_post.12", 4, pos=-2)
    fit.table                       # interchange accuracy of the subspace and of its controls
    fit.subspace.interchange(run, pos=-2)

The weights are frozen. An orthogonal map of the values at one site is learned, and its first k
directions are the subspace: taken from the source, they should give its answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from ..arguments import (
    as_items,
    check_arguments,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    describe,
)
from ..data.datasets.pairs import Pairs
from ..display import count_of, describe_outcome, first_rows, progress_bar, render_html
from ..errors import BadHook, BadPrompt, TooFew, Unsupported
from ..hooks.ablation import Patch
from ..hooks.base import Binding, EditContext, as_where, require_vectors
from ..hooks.capture import Captured, capture, merge_captures
from ..hooks.edits import edit
from ..hooks.subspace import Subspace
from ..hooks.values import FromRun
from ..hooks.vector import data_hash, describe_model
from ..models.lm import LM, refuse_no_gradient
from ..models.model_setup import freeze_weights
from ..models.next_token import token_logits
from ..models.positions import Pos, PosLike, read_position
from ..models.prompts import Row, as_batch
from ..models.sites import AnySite, Sites
from ..runs.forward import forward
from ..tables.intervals import Clusters, clustered_shares, further_draws
from .directions import BATCH

CONFIDENCE = 0.95
CONTROLS = ("random", "shuffled", "reinitialised")
MIN_STEP_LOSS = 1e-3  # a share of the lowest loss by which a lower one counts as lower


@dataclass(frozen=True, eq=False, repr=False)
class SubspaceFit:
    """What `fit_subspace` returns: a subspace, and how well interchanges within it do.

    table   a line for each intervention ("subspace", "none", "whole site" and the controls):
            site, k, intervention;
            iia, interchange intervention accuracy: the share of held-out pairs after which the
            counterfactual answer is the most likely token of the whole vocabulary, with its 95 %
            interval iia_low and iia_high; loss, the answer's mean surprisal in nats;
            n (pairs), n_fit (pairs of the training), epochs (of the training)
    """

    subspace: Subspace
    table: pd.DataFrame

    def _repr_html_(self) -> str:
        columns = ("intervention", "k", "iia", "iia_low", "iia_high", "loss")
        return render_html(self._summary, rows=first_rows(self.table, *columns))

    @property
    def _summary(self) -> str:
        line = self.table.iloc[0]
        return (
            f"SubspaceFit({line['site']}, {count_of(self.subspace.k, 'dimension')}; accuracy "
            f"{line['iia']:.3f} [{line['iia_low']:.3f}, {line['iia_high']:.3f}] on "
            f"{count_of(int(line['n']), 'held-out pair')})"
        )

    def __repr__(self) -> str:
        calls = ("fit.table", "fit.subspace.interchange(run, pos=-1)", "fit.subspace.save(path)")
        return describe_outcome(self._summary, *calls)


@check_arguments
def fit_subspace(
    lm: LM,
    pairs: Any,
    site: str | AnySite,
    k: int,
    *,
    pos: PosLike = -1,
    source_pos: PosLike = None,
    held_out: Any = 0.4,
    epochs: int = 20,
    patience: int = 3,
    lr: float = 0.1,
    batch: int = BATCH,
    controls: Iterable[str] = CONTROLS,
    draws: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> SubspaceFit:
    """Returns the subspace of k dimensions within which the source decides the answer, with a table
    of how well it does on pairs that it was not fitted to.

    pairs       of (base, source, answer): two prompts, and the token that should follow the base
                if it had the source's value of the variable; as a list or as the columns of a
                DataFrame. Of `hk.datasets` pairs these are clean, corrupted and wrong
    pos         where the base's values are replaced, and where the source's are read; with
                `source_pos`, the source's are read there
    held_out    the share of pairs that no step sees, or other pairs: half of them say when to stop,
                and the table is of the other half. Equal prompt pairs stay together
    epochs      passes over the pairs, at most. It stops after `patience` of them without a lower
                loss, and takes the subspace with the lowest
    lr          the length of the first step, as a share of a direction's. It falls to zero
    controls    "random": random subspaces of k dimensions (`draws` of them; the interval is that of
                one more draw). "shuffled": a fit to shuffled answers. "reinitialised": a fit in the
                model with random weights, which needs memory for a second model
    progress    True or False; the default is to show a bar of the epochs in a terminal

    The answer's surprisal is minimised by Adam over an orthogonal map, from a random start; the
    same call gives the same numbers. In the intervals, pairs with one base are a cluster. "none" is
    the base alone; "whole site" takes all dimensions from the source, with what should stay the
    base's. A subspace has shown something if it is above "none" and all controls: with many
    dimensions and few pairs, a fit can find paths that the model does not use (Makelov et al. 2023,
    arXiv 2311.17030).

    Raises `TooFew` for fewer than 4 pairs or without held-out ones, `BadHook` for more dimensions
    than the site has, and `Unsupported` if a control is not possible for this model.

    Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed
    Neural Representations" (arXiv 2303.02536).

    >>> pairs = hk.datasets.capitals(lm, 12, same_length=True)
    >>> fit = fit_subspace(lm, pairs, "resid_post.20", 2, epochs=1, controls=[])
    >>> fit.table["intervention"].tolist()
    ['subspace', 'none', 'whole site']
    """
    check_integer(k, "k", least=1, meaning="how many dimensions,")
    check_integer(epochs, "epochs", least=1, meaning="how many passes over the pairs,")
    check_integer(patience, "patience", least=1, meaning="how many passes without a lower loss,")
    check_integer(batch, "batch", least=1, meaning="how many pairs run together,")
    check_integer(draws, "draws", least=2, meaning="how many random subspaces,")
    check_number(lr, "lr", above=0, meaning="the length of a step,")
    check_seed(seed)
    refuse_no_gradient(lm)
    names = [check_choice(name, "controls", CONTROLS) for name in controls]
    (selected,) = _one_site(lm, site)
    task = Task.build(lm, _read_pairs(lm, pairs, "pairs"), selected, (pos, source_pos), batch)
    if as_items(held_out) is None and not isinstance(held_out, Pairs | pd.DataFrame):
        parts = _split(task, check_number(held_out, "held_out", above=0, most=0.9), seed)
    else:
        count, other = len(task.answers), _read_pairs(lm, held_out, "held_out")
        task = Task.build(lm, _joined(task.pairs, other), selected, (pos, source_pos), batch)
        remaining = torch.randperm(len(other[2]), generator=_generator(seed)) + count
        half = len(remaining) // 2
        parts = [torch.arange(count), remaining[:half], remaining[half:]]
    if min(map(len, parts)) < 1:
        raise TooFew(
            f"{len(task.answers)} pairs leave none to fit, to say when to stop, or to report: "
            "give more pairs"
        )
    if k > task.width:
        raise BadHook(f"k={k} dimensions of {selected}, which has {task.width}: give fewer")
    settings = Settings(k, epochs, patience, lr, seed, progress)
    basis, curve = _fit(task, parts, settings)
    about = {**task.about(), "k": k, "epochs": epochs, "patience": patience, "lr": lr, "seed": seed}
    subspace = Subspace(selected, basis, {**about, "pairs": len(parts[0]), "curve": curve})  # pyright: ignore
    lines = [_line("subspace", task, basis, parts[2], len(curve))]
    lines.append(_line("none", task, torch.zeros(0, task.width), parts[2]))
    lines.append(_line("whole site", task, torch.eye(task.width), parts[2]))
    for name in names:
        lines.append(_control(name, subspace, task, parts, settings, draws))
    table = pd.DataFrame(lines)
    table.insert(0, "site", str(selected))
    return SubspaceFit(subspace, table.assign(n=len(parts[2]), n_fit=len(parts[0])))


# ---- pairs


PairLists = tuple[list[Row], list[Row], list[int]]


def _one_site(lm: LM, site: str | AnySite) -> Sites:
    sites = require_vectors(lm.expand(site), "a subspace is of")
    if len(sites) != 1:
        raise BadHook(f"{len(sites)} sites were given, and a subspace is at one: name it")
    return sites


def _read_pairs(lm: LM, pairs: Any, name: str) -> PairLists:
    """Returns the rows of the bases and of the sources, and the ids of the answers."""
    bases, sources, answers = _columns_of_pairs(pairs, name)
    if not len(bases):
        raise BadPrompt(f"{name} is empty: give pairs")
    for prompt in (*bases, *sources):
        if isinstance(prompt, int):
            raise BadPrompt(
                f"{name} has {prompt} as a prompt: give a text, a chat or a list of ids"
            )
    rows = list(as_batch(lm, list(bases)).rows), list(as_batch(lm, list(sources)).rows)
    return *rows, list(map(lm.token, answers))


def _columns_of_pairs(pairs: Any, name: str) -> Sequence[Sequence[Any]]:
    """Returns the bases, the sources and the answers of pairs, in the order of the pairs."""
    if isinstance(pairs, Pairs):
        return pairs.clean, pairs.corrupted, pairs.wrong
    if isinstance(pairs, pd.DataFrame):
        if missing := {"base", "source", "answer"} - set(pairs):
            raise BadPrompt(f"{name} has no column {', '.join(sorted(missing))}")
        return [pairs[column].tolist() for column in ("base", "source", "answer")]
    triples = [as_items(pair) or () for pair in as_items(pairs) or ()]
    if not triples or set(map(len, triples)) != {3}:
        raise BadPrompt(
            f"{name}={describe(pairs)}: give a list of (base, source, answer), or a DataFrame "
            "with these columns"
        )
    return list(map(list, zip(*triples, strict=True)))


def _joined(first: PairLists, second: PairLists) -> PairLists:
    bases, sources, answers = (one + other for one, other in zip(first, second, strict=True))
    return bases, sources, answers  # pyright: ignore[reportReturnType]


def _split(task: Task, held_out: float, seed: int) -> list[Int[Tensor, " pair"]]:
    """Returns the indices of the pairs to fit, to decide when to stop, and to report on."""
    bases, sources, _ = task.pairs
    groups: dict[Any, list[int]] = {}
    for index, prompts in enumerate(zip(bases, sources, strict=True)):
        groups.setdefault(tuple(map(tuple, prompts)), []).append(index)
    members = list(groups.values())
    if len(members) < 4:
        raise TooFew(f"{count_of(len(members), 'different pair')}: give at least 4")
    count = max(2, round(held_out * len(members)))
    order = torch.randperm(len(members), generator=_generator(seed)).tolist()
    parts = order[count:], order[: count // 2], order[count // 2 : count]
    indices = []
    for part in parts:
        indices.append(torch.tensor(list(chain.from_iterable(map(members.__getitem__, part)))))
    return indices


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- interchanges


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of prompts whose answers interchanges at a site should give.

    `sources` are the values of the source prompts, a row for each pair.
    """

    lm: LM
    pairs: PairLists
    answers: Int[Tensor, " pair"]
    site: AnySite
    pos: Pos
    source_pos: Pos
    sources: Captured
    batch: int

    @staticmethod
    def build(
        lm: LM, pairs: PairLists, site: AnySite, positions: tuple[PosLike, PosLike], batch: int
    ) -> Task:
        """Returns the task, with the values of its sources, which are run here."""
        pos, source_pos = map(read_position, positions)
        at = pos if source_pos is None else source_pos
        parts = []
        for start in range(0, len(pairs[1]), batch):
            rows = pairs[1][start : start + batch]
            run = forward(lm, rows, capture(site, pos=at), logits=False)
            parts.append(replace(run.captured(site), prompts=tuple(map(tuple, rows))))
        sources = merge_captures(parts)
        if sources.values.ndim != 3:
            raise BadHook(
                f"{site} has values {list(sources.values.shape)} [pair, pos, ...], and a subspace "
                "is of one vector at each position: name one head of a site with heads"
            )
        return Task(lm, pairs, torch.tensor(pairs[2]), site, pos, source_pos, sources, batch)

    @property
    def width(self) -> int:
        """The number of dimensions of the site."""
        return self.sources.values.shape[-1]

    def about(self) -> dict[str, Any]:
        """Returns how subspaces of these pairs are made, for their `about`."""
        bases, sources, answers = self.pairs
        positions = {"pos": repr(self.pos), "source_pos": repr(self.source_pos)}
        hash = data_hash(bases, sources, [tuple(answers)])
        facts = {"method": "distributed alignment search", "data_sha256": hash}
        return {**describe_model(self.lm), **facts, **positions}

    def batches(self, rows: Int[Tensor, " pair"]) -> Sequence[Int[Tensor, " pair"]]:
        """Returns the pairs that run together."""
        return rows.split(self.batch)

    def logits(
        self, basis: Float[Tensor, "k d"], rows: Int[Tensor, " pair"], *, grad: bool = False
    ) -> Float[Tensor, "pair token"]:
        """Returns the bases' next-token logits, with the sources' component within a subspace."""
        indices = rows.tolist()
        prompts = [self.pairs[0][row] for row in indices]
        hooks: list[Any] = [edit(self.site, self._change(basis, indices), pos=self.pos)]
        if grad:
            hooks.append(capture(self.site, grad=True, pos=self.pos))
        run = forward(self.lm, prompts, *hooks, logits="last")
        return token_logits(run.logits[:, -1].float(), self.lm.n_tokens)

    def _change(self, basis: Float[Tensor, "k d"], rows: list[int]) -> Any:
        """Returns the function of an edit of these bases, in which the basis may have gradients."""
        values, positions = self.sources.values[rows], self.sources.positions
        assert positions is not None
        prompts = tuple(self.sources.prompts[row] for row in rows)
        part = replace(self.sources, values=values, positions=positions[rows], prompts=prompts)
        source = FromRun((replace(part, rows=tuple(range(len(rows)))),))
        where = as_where(self.pos)
        patch = Patch(Sites((self.site,)), where, source, source_pos=self.source_pos)
        put_in = patch.change(Binding(self.lm, self.site, lambda prompts: part))

        def interchange(values: Tensor, here: EditContext) -> Tensor:
            difference = put_in(values, here).float() - values.float()
            directions = basis.to(values.device)
            return values + ((difference @ directions.T) @ directions).to(values.dtype)

        return interchange

    def losses(
        self, basis: Float[Tensor, "k d"], rows: Int[Tensor, " pair"]
    ) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
        """Returns the answer's surprisal after each pair, and 1 where it is the likeliest token."""
        losses, hits = [], []
        with torch.no_grad():
            for part in self.batches(rows):
                logits, answers = self.logits(basis, part).cpu(), self.answers[part]
                losses.append(nn.functional.cross_entropy(logits, answers, reduction="none"))
                hits.append(logits.argmax(-1) == answers)
        return torch.cat(losses).double().numpy(), torch.cat(hits).double().numpy()


# ---- the fit


@dataclass(frozen=True)
class Settings:
    """How a subspace is fitted; see `fit_subspace`."""

    k: int
    epochs: int
    patience: int
    lr: float
    seed: int
    progress: bool | None


class Rotation(nn.Module):
    """The first k directions of an orthogonal map, [k, d]."""

    def __init__(self, start: Float[Tensor, "k d"], seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # torch completes the start to a basis of all dimensions
            orthogonal(self)


def _fit(
    task: Task, parts: Sequence[Int[Tensor, " pair"]], settings: Settings
) -> tuple[Float[Tensor, "k d"], list[float]]:
    """Returns the basis with the lowest loss on the second part, and its loss after each epoch."""
    fitted, stopping = parts[0], parts[1]
    generator = _generator(settings.seed)
    start = torch.linalg.qr(torch.randn(task.width, settings.k, generator=generator))[0].T
    with torch.inference_mode(False), torch.enable_grad(), freeze_weights(task.lm.model):
        rotation = Rotation(start.contiguous(), settings.seed)
        adam = torch.optim.Adam(rotation.parameters(), lr=settings.lr / task.width**0.5)
        steps = settings.epochs * len(task.batches(fitted))
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
        best, lowest, curve = start, np.inf, []
        waited = 0
        for _ in progress_bar(settings.progress, iterable=range(settings.epochs), unit="epoch"):
            order = fitted[torch.randperm(len(fitted), generator=generator)]
            for rows in task.batches(order):
                logits = task.logits(rotation.weight, rows, grad=True)
                answers = task.answers[rows].to(logits.device)
                adam.zero_grad()
                nn.functional.cross_entropy(logits, answers).backward()
                adam.step()
                schedule.step()
            basis = rotation.weight.detach().clone()
            curve.append(float(task.losses(basis, stopping)[0].mean()))
            waited += 1
            if curve[-1] < lowest * (1 - MIN_STEP_LOSS):
                waited = 0
            if curve[-1] < lowest:
                best, lowest = basis, curve[-1]
            if waited == settings.patience:
                break
    return best, curve


# ---- the table


def _line(
    name: str, task: Task, basis: Tensor, rows: Int[Tensor, " pair"], epochs: int = 0
) -> dict[str, Any]:
    """Returns the line of an intervention, with an interval over pairs of different bases."""
    losses, hits = task.losses(basis, rows)
    bases = [tuple(task.pairs[0][row]) for row in rows.tolist()]
    index = np.array(list(map(list(dict.fromkeys(bases)).index, bases)))
    sums, sizes = np.bincount(index, hits), np.bincount(index)
    of_clusters = [[sums.sum()], [(sums**2).sum()], [(sums * sizes).sum()], [(sums > 0).sum()]]
    clusters = Clusters(len(sizes), sizes.sum(), (sizes**2).sum())
    shares = clustered_shares(np.array(of_clusters, dtype=float), clusters, CONFIDENCE)
    limits = {"iia_low": float(shares.low[0]), "iia_high": float(shares.high[0])}
    line = {"k": len(basis), "intervention": name, "iia": float(shares.mean[0]), **limits}
    return {**line, "loss": float(losses.mean()), "epochs": epochs}


def _control(
    name: str,
    subspace: Subspace,
    task: Task,
    parts: Sequence[Int[Tensor, " pair"]],
    settings: Settings,
    draws: int,
) -> dict[str, Any]:
    """Returns the line of a control."""
    if name == "random":
        accuracies, losses = [], []
        for draw in range(draws):
            basis = subspace.random(seed=settings.seed + draw).basis.tensor
            draw_losses, hits = task.losses(basis, parts[2])
            accuracies.append([hits.mean()])
            losses.append(draw_losses.mean())
        limits = further_draws(np.array(accuracies), CONFIDENCE)
        low, high = max(float(limits.low[0]), 0.0), min(float(limits.high[0]), 1.0)
        line = {"k": settings.k, "intervention": "random subspaces", "iia": float(limits.mean[0])}
        return {
            **line,
            "iia_low": low,
            "iia_high": high,
            "loss": float(np.mean(losses)),
            "epochs": 0,
        }
    if name == "shuffled":
        fitted = torch.cat(list(parts[:2]))
        answers = task.answers.clone()
        answers[fitted] = answers[
            fitted[torch.randperm(len(fitted), generator=_generator(settings.seed))]
        ]
        basis, curve = _fit(replace(task, answers=answers), parts, settings)
        return _line("shuffled answers", task, basis, parts[2], len(curve))
    other = _reinitialised(task.lm, settings.seed)
    positions = task.pos, task.source_pos
    other_task = Task.build(other, task.pairs, task.site, positions, task.batch)
    basis, curve = _fit(other_task, parts, settings)
    return _line("reinitialised model", other_task, basis, parts[2], len(curve))


def _reinitialised(lm: LM, seed: int) -> LM:
    """Returns the model with random weights, made from its configuration."""
    if lm.config is None or lm.adapters or lm.ranks is not None:
        raise Unsupported(
            "a model without a configuration, with adapters, or split among processes is not made "
            "anew: leave 'reinitialised' out of controls="
        )
    root: Any = lm.root
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(root)(copy.deepcopy(lm.config)).eval()
    model = model.to(device=lm.device, dtype=root.dtype)
    return LM(model, lm.tokenizer, f"{lm.name or type(root).__name__}, reinitialised", lm.row)
