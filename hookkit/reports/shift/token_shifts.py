"""`hk.token_shifts`: which tokens an edit, or another model, moves over a whole corpus."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...arguments import check_arguments, check_integer, check_seed
from ...data.harvest.folder import describe_model as model_settings
from ...data.harvest.folder import flatten, refuse_other_settings
from ...data.harvest.stored_values import Progress
from ...data.harvest.texts import (
    Batch,
    Long,
    OnError,
    Rules,
    TextReader,
    TextsLike,
    TokenSequence,
    Window,
    read_rules,
)
from ...errors import BadFile, BadHook, DamagedHarvest, EmptySelection, HarvestChanged
from ...files.atomic import lock_folder, remove_leftovers, write_tensors, write_text
from ...files.untrusted import check_folder, check_mapping, parse_json, read_json, read_tensors
from ...hooks.base import EVERY_STEP, Hook
from ...hooks.logits import LogitEdit
from ...models.lm import LM
from ...models.positions import PosLike, Where, read_position
from ...models.provenance import about_model, git_commit, versions
from ...models.sites import Site, Sites
from ...runs.engines.actors import Step, Steps, run_steps
from ...runs.engines.ray import EngineLike, Ray, read_engine
from ...tables import intervals
from ...tables.intervals import Clusters, Estimates
from ..comparison_page import (
    hook_as_json,
)
from ..control_draws import DRAWS, NO_CONTROL, ControlMaker
from ..diff.diff_control import TURNED
from ..diff.paired_models import Around, Side, check_vocabularies, reader_of
from .corpus_page import TokenShifts, furthest
from .corpus_sums import PADDING, BatchShifts, CorpusSums, Examples
from .logit_changes import Control, ShiftComputation
from .named_edits import Hooks, as_edit_hooks

ChangeLike: TypeAlias = Hook | Sequence[Hook] | LM

SETTINGS, STATE = "corpus.json", "corpus.safetensors"
FORMAT = 1
SAVE_SECONDS = 60.0  # between two states on disk
CONFIDENCE = 0.95
LIKELY_POSITIONS = 32  # after which the ranks of a control's tokens are compared
WITH_EXAMPLES = 100  # tokens of each direction that have rows in the table of examples
MEASURES = {  # the columns of the table, and the sums that they are made from
    "share_promoted": "promoted",
    "share_demoted": "demoted",
    "logprob_delta": "logprob",
    "rank_delta": "rank",
}


# ---- the table


def _build_table(lm: LM, sums: CorpusSums) -> pd.DataFrame:
    n_tokens = sums.texts.n_tokens
    ids = np.arange(n_tokens)
    table = pd.DataFrame({"token_id": ids, "token": lm.strings})
    for name in ("promoted", "demoted"):
        table[name] = sums.texts.of_token[name][0].numpy().astype(np.int64)
    columns: dict[str, Any] = {}
    for measure, name in MEASURES.items():
        columns |= _interval_columns(measure, _estimate(sums, name))
    for measure, name in MEASURES.items():
        estimates = _estimate_control(sums, name)
        columns |= _interval_columns(f"control_{measure}", estimates)
    table = pd.concat([table, pd.DataFrame(columns)], axis=1)
    return furthest(table, "promoted").reset_index(drop=True)


def _interval_columns(name: str, estimates: Estimates) -> dict[str, np.ndarray]:
    return {name: estimates.mean, f"{name}_low": estimates.low, f"{name}_high": estimates.high}


def _estimate(sums: CorpusSums, name: str) -> Estimates:
    """Returns the means over the texts, with intervals."""
    sizes = sums.texts.sizes[1 if name == "rank" else 0].tolist()
    values = sums.texts.of_token[name].numpy()
    if name in ("promoted", "demoted"):
        return intervals.clustered_shares(values, Clusters(*sizes), CONFIDENCE)
    return intervals.clustered_means(values, Clusters(*sizes), CONFIDENCE)


def _estimate_control(sums: CorpusSums, name: str) -> Estimates:
    """Returns the means over the draws of the control that have positions, with their limits."""
    draws = _means_of_draws(sums, name)
    if not draws:
        nothing = np.full(sums.texts.n_tokens if name != "kl" else 1, np.nan)
        return Estimates(nothing, nothing, nothing, nothing, "")
    estimates = intervals.further_draws(np.stack(draws), CONFIDENCE)
    if name not in ("promoted", "demoted", "kl"):
        return estimates
    most = np.inf if name == "kl" else 1.0
    low, high = np.maximum(estimates.low, 0.0), np.minimum(estimates.high, most)
    return Estimates(estimates.mean, estimates.error, low, high, estimates.method)


def _means_of_draws(sums: CorpusSums, name: str) -> list[np.ndarray]:
    """Returns the mean over the positions of each draw of the control that has some."""
    means = []
    for draw in sums.draws:
        positions, ranked = draw.counts.tolist()
        size = positions if name in ("promoted", "demoted") else ranked
        if size:
            values = draw.kl[None] if name == "kl" else draw.of_token[name]
            means.append(values.numpy() / size)
    return means


def _build_summary(sums: CorpusSums, left_out: int) -> pd.DataFrame:
    texts, positions, squares = sums.texts.sizes[0].tolist()
    values = sums.texts.kl.numpy()[:, None]
    kl = intervals.clustered_means(values, Clusters(texts, positions, squares), CONFIDENCE)
    row = {
        "texts": int(texts),
        "left_out": left_out,
        "positions": int(positions),
        "ranked": int(sums.texts.sizes[1, 1]),
        **_interval_columns("kl", kl),
        "draws": sum(bool(draw.counts[0] > 0) for draw in sums.draws),
        **_interval_columns("control_kl", _estimate_control(sums, "kl")),
    }
    return pd.DataFrame(row)


def _build_examples(lm: LM, sums: CorpusSums, table: pd.DataFrame) -> pd.DataFrame:
    columns = ["token_id", "token", "moved", "logprob_delta", "text", "piece", "pos", "context"]
    records = []
    for name, sign in (("promoted", 1), ("demoted", -1)):
        examples = sums.examples[name]
        for token in furthest(table, name)["token_id"].head(WITH_EXAMPLES):
            start, stop = np.searchsorted(examples.tokens, [token, token + 1])
            for number in range(start, stop):
                delta = sign * float(examples.strength[number])
                location = _location_of(lm, examples, number)
                records.append((int(token), lm.string(int(token)), name, delta, *location))
    return pd.DataFrame(records, columns=columns)


def _location_of(lm: LM, examples: Examples, number: int) -> tuple[int, int, int, str]:
    text, piece, pos, *context = examples.locations[number].tolist()
    ids = [token for token in context if token != PADDING]
    return text, piece, pos, lm.text(ids)


# ---- the folder


@dataclass(eq=False)
class Journal:
    """The state of an unfinished corpus on disk: all sums, and how far the texts were read.

    Without a folder nothing is written. `token_shifts` owns it.
    """

    folder: Path | None
    settings: Mapping[str, Any]
    is_writer: bool
    state: dict[str, Tensor] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    def open(self) -> dict[str, Any] | None:
        """Checks or writes the settings. Returns how far the texts were read, or None."""
        if self.folder is None:
            return None
        path, progress = self.folder / SETTINGS, None
        if path.exists():
            self._check_settings(self.folder)
            progress = self._read_state()
        if self.is_writer:
            remove_leftovers(self.folder)
            text = json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n"
            write_text(path, text)
        return progress

    def _check_settings(self, folder: Path) -> None:
        """Raises `HarvestChanged` if the folder has sums of other settings."""
        try:
            old = check_mapping(read_json(folder / SETTINGS), SETTINGS)
        except BadFile as error:
            raise DamagedHarvest(
                f"{SETTINGS} of {folder.name!r} cannot be read: {error}; give another folder"
            ) from error
        new = json.loads(json.dumps(self.settings))
        pair = dict(flatten(old)), dict(flatten(new))
        for flat in pair:  # the paths of the models decide nothing
            flat.pop("before.name", None)
            flat.pop("after.name", None)
        refuse_other_settings(folder, "token shifts", *pair)

    def _read_state(self) -> dict[str, Any] | None:
        assert self.folder is not None
        path = self.folder / STATE
        if not path.exists():
            return None
        tensors, about = read_tensors(path, error=DamagedHarvest)
        progress = parse_json(about.get("progress", ""), STATE, error=DamagedHarvest)
        self.state = {name: tensor.clone() for name, tensor in tensors.items()}
        return dict(check_mapping(progress, STATE, error=DamagedHarvest))

    def save(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Writes the state."""
        if self.folder is not None and self.is_writer:
            about = {"progress": json.dumps(dict(progress))}
            write_tensors(self.folder / STATE, tensors, about)
        self.saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """True if the state on disk is older than `SAVE_SECONDS`."""
        return self.folder is not None and time.monotonic() - self.saved_at >= SAVE_SECONDS


# ---- reading the corpus


@dataclass(eq=False)
class CorpusReading:
    """One pass over the texts. `token_shifts` owns it."""

    reader: TextReader
    work: ShiftComputation
    sums: CorpusSums
    journal: Journal
    progress: Progress
    first_window: Window | None = None
    likely: Tensor | None = None  # logits from which the control's tokens were drawn
    left_out: int = 0

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Continues after what is on disk. Returns whether all texts were read."""
        try:
            self.sums.load(self.journal.state)
            self.left_out = int(state["left_out"])
            self.reader.skip(int(state["text"]), int(state["piece"]), str(state["stream"]))
        except HarvestChanged:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            raise DamagedHarvest(
                f"{STATE} lacks a part of its state ({error}): give another folder"
            ) from error
        self.progress.skip_to(int(state["text"]))
        if state["finished"]:
            self._check_end(state)
        return bool(state["finished"])

    def _check_end(self, state: Mapping[str, Any]) -> None:
        """Raises `HarvestChanged` if there are other texts than those that were read."""
        has_more = self.reader.read() is not None
        if has_more or self.reader.digest != state["all_texts"]:
            raise HarvestChanged(
                f"the folder's corpus has {state['texts']} texts, and others or more were given: "
                "give another folder"
            )

    def run(self, engine: Ray | None) -> None:
        """Reads all texts that are left."""
        run_steps(engine, self.work.lm, self.work, self._steps())

    def _steps(self) -> Steps:
        window = self.first_window or self.reader.read_window()
        last: TokenSequence | None = None
        while window is not None:
            for batch in self._batches(window):
                yield Step(batch, partial(self._add, batch))
            last = window.sequences[-1]
            self.left_out += window.left_out
            yield Step(None, partial(self._end_window, last, self.left_out))
            window = self.reader.read_window()
        yield Step(None, partial(self._finish, last))

    def _batches(self, window: Window) -> list[Batch]:
        """The batches of whole texts, then those of pieces, in their order."""
        whole, pieces = [], []
        for sequence in window.sequences:
            (pieces if self.work.is_piece(sequence) else whole).append(sequence)
        rules = self.reader.rules
        batches = Window(tuple(whole)).batches(rules)
        return batches + Window(tuple(pieces)).batches_in_order(rules)

    def _add(self, batch: Batch, result: BatchShifts) -> None:
        self.sums.add(result)
        self.progress.add(batch)

    def _end_window(self, last: TokenSequence, left_out: int, _: object) -> None:
        self.progress.advance_to(last.text)
        self.sums.merge_examples()
        if self.journal.is_due:
            self._save(last, left_out, finished=False)

    def _finish(self, last: TokenSequence | None, _: object) -> None:
        self.sums.close_text()
        self.left_out += self.reader.left_out
        if last is not None:
            self._save(last, self.left_out, finished=True)

    def _save(self, last: TokenSequence, left_out: int, *, finished: bool) -> None:
        state = {"text": last.text, "piece": last.piece, "stream": last.stream}
        state |= {"left_out": left_out, "finished": finished}
        state |= {"texts": self.reader.text + 1, "all_texts": self.reader.digest}
        tensors = self.sums.tensors()
        if self.likely is not None:
            tensors["likely"] = self.likely
        self.journal.save(tensors, state)


# ---- the control


def _draw_control(
    sides: tuple[Side, Side], edits: tuple[Hook, ...], likely: Tensor, draws: int, seed: int
) -> tuple[Control | None, str]:
    """Returns the control and what it is in words; or None and why there is none."""
    if not draws:
        return None, ""
    try:
        if sides[0].lm is not sides[1].lm or not edits:
            return _turned_control(sides, draws, seed)
        control = ControlMaker(sides[0].lm, likely).draw(edits, draws, seed)
    except NO_CONTROL as error:
        return None, f"there is none: {error}"
    return Control(control.draws), f"{control.description}. {_describe_draws(len(control.draws))}"


def _turned_control(sides: tuple[Side, Side], draws: int, seed: int) -> tuple[Control | None, str]:
    """Returns the difference of two models in random directions as a control, and in words."""
    sites = [Site("resid_post", side.lm.n_layers - 1) for side in sides]
    shapes = [side.lm.shape(site) for side, site in zip(sides, sites, strict=True)]
    if sites[0] != sites[1] or shapes[0] != shapes[1]:
        return None, "there is none, as the models have streams of different sizes or depths."
    seeds = [Random(f"{seed} {draw}").randrange(2**31) for draw in range(draws)]
    control = Control(seeds=tuple(seeds), site=sites[0])
    return control, f"{TURNED}. {_describe_draws(draws)}"


def _describe_draws(count: int) -> str:
    return f"Text n has draw n modulo {count}. Means are taken at an equal KL of each position."


def _likely_logits(side: Side, window: Window, rules: Rules) -> Tensor:
    """Returns the logits after some positions of the first texts, from which tokens are drawn."""
    batch = window.batches(rules)[0]
    rows = [sequence.ids for sequence in batch.sequences]
    logits = side.run(rows, Sites(()), logits=True).logits
    selected = []
    for row, sequence in enumerate(batch.sequences):
        selected.append(logits[row, list(sequence.positions)].float().cpu())
    all_logits = torch.cat(selected)
    numbers = np.linspace(0, len(all_logits) - 1, min(LIKELY_POSITIONS, len(all_logits)))
    return all_logits[numbers.round().astype(int).tolist()].clone()


# ---- the public function


class CorpusSettings(TypedDict, total=False):
    """How `token_shifts` reads its texts, and in which states the model runs."""

    seed: int
    base_hooks: Hooks
    while_before: Around
    while_after: Around
    every: int
    examples: int
    context: int | None
    long: Long
    on_error: OnError
    batch_tokens: int
    engine: EngineLike
    progress: bool


@check_arguments
def token_shifts(
    lm: LM,
    texts: TextsLike,
    change: ChangeLike,
    *,
    folder: str | os.PathLike[str] | None = None,
    top: int = 10,
    pos: PosLike = None,
    controls: int = DRAWS,
    **settings: Unpack[CorpusSettings],
) -> TokenShifts:
    """Returns which tokens a change moves over a corpus: how often, by how much, and where.

    `texts` is any iterable of texts or rows of token ids, or the path of a file with a text a line
    (.txt, .jsonl), as for `harvest`; it is read once. `change` is one hook or several that act
    together, or another model with the same vocabulary, such as a fine-tuned one. The same model in
    two states is given twice, with a `with` block: `while_before=model.disable_adapter`. An edit of
    logits that names no position acts at all of them.

    At each position that `pos` selects (all by default), the tokens whose log-probability rose most
    are promoted, and those that fell most are demoted, `top` of each; tokens that changed equally
    count only if all of them are among these. Ranks need a sort of the vocabulary, so they are
    compared at one position in `every` (16), other positions in each text.

    The intervals are over texts, as the positions of a text depend on each other. The control is
    drawn `controls` times (0 for none): the edit at other tokens or parts, or changes in random
    directions, as in `shift_report`; for two models, their difference after the last block in
    random directions. Each text has one of the draws. The means of the control are taken where its
    change of the logits is scaled so that each position has the KL(before‖after) of the change
    itself. Memory does not grow with the corpus: at most 1 kB for each token of the vocabulary.

    With `folder`, the state is kept there each minute. The same call continues after an
    interruption, and gives the same table to the last digit; other texts or settings raise
    `HarvestChanged`.

    seed          of the draws of the control
    base_hooks    hooks that act before and after
    every         one position in so many has ranks, by default 16
    examples      how many positions are kept for each token, by default 3
    context, long, on_error, batch_tokens, engine, progress   as for `harvest`

    >>> texts = ["I like oat milk in my", "The capital of France is", "Tea with"]
    >>> shifts = token_shifts(lm, texts, boost(" coffee", by=5.0), controls=2, progress=False)
    >>> shifts.table["token"].iloc[0], int(shifts.table["promoted"].iloc[0])
    (' coffee', 14)
    """
    options = _read_settings(settings)
    check_integer(top, "top", least=1, most=(lm.n_tokens or 2**31) - 1)
    check_integer(controls, "controls", least=0)
    sides, edits = _read_sides(lm, change, options)
    reader_lm = reader_of(*[side.lm for side in sides])
    context = _shorter_context(options["context"], sides)
    reading_settings = (options[name] for name in ("long", "on_error", "batch_tokens"))
    rules = read_rules(reader_lm, pos, context, *reading_settings)
    ray = read_engine(options["engine"], lm)
    path = None if folder is None else check_folder(folder)
    about = {
        "format": FORMAT,
        "before": _about_side(sides[0], hashed=path is not None),
        "after": _about_side(sides[1], hashed=path is not None),
        "pos": repr(rules.where.pos),
        "context": rules.context,
        "top": top,
        "controls": controls,
        "seed": check_seed(options["seed"]),
    }
    for name in ("long", "on_error", "batch_tokens", "every", "examples"):
        about[name] = options[name]
    lock = nullcontext()
    if path is not None and lm.is_writer:
        lock = lock_folder(path, "is writing token shifts")
    reader = TextReader(reader_lm, texts, rules)
    with lock, Progress(reader, options["progress"] and lm.is_writer) as bar:
        journal = Journal(path, about, lm.is_writer)
        reading, words = _read_corpus(reader, sides, edits, journal, bar, ray)
    sums, summary = reading.sums, _build_summary(reading.sums, reading.left_out)
    table = _build_table(reader_lm, sums)
    return TokenShifts(
        table,
        _build_examples(reader_lm, sums, table),
        summary,
        _names(sides, change),
        _build_about(sides, about, words),
    )


def _read_corpus(
    reader: TextReader,
    sides: tuple[Side, Side],
    edits: tuple[Hook, ...],
    journal: Journal,
    bar: Progress,
    engine: Ray | None,
) -> tuple[CorpusReading, str]:
    """Reads the texts that are left. Returns the sums, and the control in words."""
    settings, rules = journal.settings, reader.rules
    draws, state, window = settings["controls"], journal.open(), None
    likely = journal.state.pop("likely", torch.zeros(1, 1))
    if state is None:
        window = _read_first_window(reader)
        if draws and any(isinstance(hook, LogitEdit) for hook in edits):
            likely = _likely_logits(sides[0], window, rules)
    control, words = _draw_control(sides, edits, likely, draws, settings["seed"])
    split_at = (rules.context or 0) if rules.long == "split" else 0
    n_examples = settings["examples"]
    work = ShiftComputation(
        reader.lm, *sides, control, settings["top"], settings["every"], n_examples, split_at
    )
    sums = CorpusSums.empty(_count_tokens(reader.lm), len(control or ()), n_examples)
    reading = CorpusReading(reader, work, sums, journal, bar, window, likely)
    if state is None or not reading.resume(state):
        reading.run(engine)
    return reading, words


def _read_settings(settings: CorpusSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "seed": 0,
        "base_hooks": (),
        "while_before": None,
        "while_after": None,
        "every": 16,
        "examples": 3,
        "context": None,
        "long": "error",
        "on_error": "error",
        "batch_tokens": 512,
        "engine": None,
        "progress": True,
        **settings,
    }
    check_integer(options["every"], "every", least=1)
    check_integer(options["examples"], "examples", least=0)
    return options


def _read_first_window(reader: TextReader) -> Window:
    """Returns the first texts. Raises `EmptySelection` if no text has a position."""
    window = reader.read_window()
    if window is not None:
        return window
    texts = reader.text + 1
    if not texts:
        raise EmptySelection("no text was given: the stream of texts is empty")
    raise EmptySelection(
        f"none of the {texts} texts has a position at pos={reader.rules.where.pos!r}: give others"
    )


def _count_tokens(lm: LM) -> int:
    return lm.n_tokens or lm.sizes["vocab"] or 0


def _shorter_context(context: int | None, sides: tuple[Side, Side]) -> int | None:
    """Returns the number of tokens that both models can read; None for no limit."""
    if context is not None:
        return context
    limits = filter(None, [side.lm.context for side in sides])
    return min(limits, default=None)


def _read_sides(
    lm: LM, change: ChangeLike, options: Mapping[str, Any]
) -> tuple[tuple[Side, Side], tuple[Hook, ...]]:
    """Returns the models before and after with their hooks, and the hooks of the change."""
    base = as_edit_hooks(options["base_hooks"], "base_hooks")
    for hook in base:
        _refuse_rows(hook)
    other, edits = (change, ()) if isinstance(change, LM) else (lm, _read_edits(change))
    before = Side(lm, base, options["while_before"] or nullcontext)
    after = Side(other, (*base, *edits), options["while_after"] or nullcontext)
    check_vocabularies(lm, other)
    is_stated = edits or options["while_before"] or options["while_after"]
    if lm.root is other.root and not is_stated:
        raise BadHook(
            "both are one model, so that nothing changes: give a hook, another model, or a block "
            "around the forwards of one, while_before=model.disable_adapter"
        )
    return (before, after), edits


def _read_edits(change: Hook | Sequence[Hook]) -> tuple[Hook, ...]:
    edits = tuple(map(_at_every_position, as_edit_hooks(change, "the change")))
    if not edits:
        raise BadHook("there is no change: give a hook, several, or another model")
    return edits


def _refuse_rows(hook: Hook) -> None:
    if hook.where.rows is not None:
        raise BadHook(
            f"{hook} names rows, and a corpus has none: its texts share batches by their length"
        )


def _at_every_position(hook: Hook) -> Hook:
    """Returns the hook; an edit of logits that names no position or step acts at all positions."""
    _refuse_rows(hook)
    if not isinstance(hook, LogitEdit) or hook.where != Where(step=EVERY_STEP):
        return hook
    return replace(hook, where=Where(read_position(slice(None))))


def _about_side(side: Side, *, hashed: bool) -> dict[str, Any]:
    """The model, its hooks and its block; with the hashes that a folder's settings need."""
    about = model_settings(side.lm) if hashed else {}
    within = ""
    if side.around is not nullcontext:
        within = getattr(side.around, "__qualname__", type(side.around).__name__)
    return about | {"hooks": list(map(hook_as_json, side.hooks)), "within": within}


def _names(sides: tuple[Side, Side], change: ChangeLike) -> tuple[str, str]:
    before, after = (str(about_model(side.lm)["model"]) for side in sides)
    if not isinstance(change, LM):
        return before, " + ".join(map(str, as_edit_hooks(change, "the change")))
    return (before, after) if before != after else (f"{before} before", f"{after} after")


def _build_about(
    sides: tuple[Side, Side], settings: Mapping[str, Any], control: str
) -> dict[str, Any]:
    about = dict(settings)
    for name, side in zip(("before", "after"), sides, strict=True):
        about[name] = dict(about_model(side.lm)) | dict(settings[name])
    return about | {"control": control, "versions": versions(), "git_commit": git_commit()}
