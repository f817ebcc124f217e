"""Run: the result of one `hk.forward` or one `hk.generate`.

`CaptureStore` holds the captures and the firings of the texts that run in a block. It raises for a
hook that never fired, and gives the log.
"""

import copy
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..display import describe_outcome, render_html
from ..errors import NeverFired, NotCaptured, Unsupported
from ..files.atomic import save_tensors
from ..hooks.base import Hook
from ..hooks.capture import (
    Capture,
    Captured,
    CapturedChunk,
    Captures,
    LazyCapture,
    SequenceEnd,
    join_chunks,
    swap_head_and_query,
)
from ..models.batch_positions import Selection, SequenceBatch
from ..models.lm import LM
from ..models.positions import PositionRange
from ..models.prompt_row import Row
from ..models.prompts import continue_row
from ..models.sites import AnySite, Site, Sites
from ..models.views import unseen_value
from .hook_points import BoundHook, Firing
from .trace import GenerationRecord

LOG_COLUMNS = ["hook", "do", "site", "forward", "row", "positions", "numbers", "changed"]
LOG_COLUMNS += ["held", "reason"]


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The result of one forward or one generate.

    tokens          [row, pos]   ids, with the generated ones; shorter rows are padded at the end
    mask            [row, pos]   True for real tokens
    prompt_rows     the prompt of each row (several rows have one prompt if num_return_sequences is
                    more than 1)
    prompt_lengths  the number of tokens of each row that are its prompt
    output          what transformers returned
    arguments       the arguments of generate that were passed on to transformers
    recorded        the record of each step of a generate with trace=, for `candidates` and
                    `decisions`
    """

    lm: LM
    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    prompt_rows: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    hooks: tuple[Hook, ...]
    captures: Captures
    kept_logits: Captured | None
    settings: Mapping[str, Any]
    output: Any
    _captures: "CaptureStore | None"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: GenerationRecord | None = None
    prompts: tuple[Row, ...] = ()  # as the model read them, with images or other inputs

    @cached_property
    def rows(self) -> list[Row]:
        """Each row's token ids, with the generated ones and the other inputs of its prompt."""
        rows: list[Row] = []
        for number, ids in enumerate(self.tokens.tolist()):
            prompt = self.prompts[self.prompt_rows[number]]
            written = ids[self.prompt_lengths[number] : self.lengths[number]]
            rows.append(continue_row(self.lm, prompt, written))
        return rows

    @property
    def logits(self) -> Float[Tensor, "row pos vocab"]:
        """The logits that the model returned, after every edit.

        Of a forward [row, pos, vocab], with one position for logits="last". Of a generate
        [row, step, vocab]: the logits that chose each generated token.
        """
        return self.captured_logits().values

    def captured_logits(self) -> Captured:
        """Returns the logits with their positions; `NotCaptured` if the run has none."""
        if self.kept_logits is None:
            raise NotCaptured(
                "this run kept no logits: it was made with logits=False; make it with logits='all'"
            )
        return self.kept_logits

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.mask.sum(dim=1).tolist()

    @cached_property
    def text(self) -> list[str]:
        """Each row as text, with special tokens."""
        rows = zip(self.tokens.tolist(), self.lengths, strict=True)
        return [self.lm.text(row[:length]) for row, length in rows]

    @cached_property
    def roles(self) -> list[tuple[str, ...]]:
        """Who said each token of each row: "user", "assistant" …, or "template" for the template's
        own tokens. A row that is no chat has none; what a chat model wrote is the assistant's.
        """
        return [getattr(row, "roles", ()) for row in self.rows]

    @cached_property
    def generated(self) -> list[str]:
        """The text that the model wrote after each prompt; empty for a forward.

        The prompt's text, followed by this, is `text`.
        """
        rows = zip(self.tokens.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [self.lm.added(row[:start], row[start:end]) for row, start, end in rows]

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        """The captured values at a site [row, pos, ...].

        `run[site, name]` if several captures were at the site.
        """
        return self.captures[key]

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """Returns the captured values at a site, with their rows and positions."""
        return self.captures.captured(site, name)

    @property
    def sites(self) -> Sites:
        """The sites that were captured."""
        return self.captures.sites

    def stack(self, name: str) -> Tensor:
        """Returns the values of every captured layer of a site: [layer, row, pos, ...].

        `name` is the site without its layer, such as "resid_post".
        """
        return self.captures.stack(name)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the captured values by site, or by site and name if the capture has a name."""
        tensors = {}
        for captured in self.captures.all:
            key = str(captured.site)
            if captured.name:
                key = f"{key}/{captured.name}"
            tensors[key] = captured.values
        return tensors

    def tensor_words(self) -> dict[str, str]:
        """Returns how the run was made, as text for a file of tensors.

        The same run gives the same text.
        """
        facts = {name: value for name, value in self.about.items() if name != "seconds"}
        return {"about": json.dumps(facts)}

    def save_tensors(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
    ) -> Path:
        """Writes the captured values to a safetensors file and returns the file's path.

        The file also holds how the run was made, and the texts in `about`.
        `hk.results.load_tensors` reads the values back. If several processes hold a split model
        together, only the first writes.
        """
        if not self.lm.is_writer:
            return Path(path)
        return save_tensors(self.tensors(), path, about={**self.tensor_words(), **(about or {})})

    @cached_property
    def log(self) -> pd.DataFrame:
        """Where each hook fired, and where its condition held.

        Columns: hook, do, site, forward, row, positions, numbers, changed, held, reason.
        """
        assert self._captures is not None
        log = self._captures.log()
        # a run that `dataclasses.replace` made may have fewer hooks than those that acted
        return pd.DataFrame(log[log["hook"] < len(self.hooks)]).reset_index(drop=True)

    @cached_property
    def about(self) -> dict[str, Any]:
        """How the run was made: model, versions, prompts, hooks and settings, ready for JSON."""
        from ..models.provenance import about_model

        rows = zip(self.tokens.tolist(), self.prompt_lengths, strict=True)
        prompts = [self.lm.text(row[:length]) for row, length in rows]
        hooks = [hook.to_json(tensors="digest") for hook in self.hooks]
        return {**about_model(self.lm), "prompts": prompts, "hooks": hooks, **self.settings}

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which has the log itself and not the firings."""
        return {**self.__dict__, "log": self.log, "_captures": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        """A run with values of its own, and the same model and hooks."""
        for shared in (self.lm, self.hooks):
            memo[id(shared)] = shared
        new = object.__new__(type(self))
        memo[id(self)] = new
        try:
            new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        except RuntimeError as error:
            if "deepcopy protocol" not in str(error):
                raise
            raise Unsupported(
                "this run's values are on the path of a gradient, which torch cannot copy: copy "
                "what you need of it, such as run.logits.detach().clone()"
            ) from error
        return new

    def _ipython_key_completions_(self) -> list[str]:
        """The keys that a notebook offers after `run["`."""
        return list(map(str, self.sites))

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {}
        if self.kept_logits is not None:
            facts["logits"] = str(list(self.kept_logits.values.shape))
        if self.hooks:
            facts["hooks"] = "; ".join(map(str, self.hooks))
        if len(self.sites):
            facts["captured"] = f"{self.sites}"
        rows: list[dict[str, object]] = []
        for row, text in enumerate(self.text):
            cells: dict[str, object] = {"row": row, "tokens": self.lengths[row], "text": repr(text)}
            if any(self.generated):
                cells["written"] = repr(self.generated[row])
            rows.append(cells)
        return render_html(f"Run: {self.settings.get('verb', '')}", facts, rows)

    def __repr__(self) -> str:
        rows = "1 row" if len(self.lengths) == 1 else f"{len(self.lengths)} rows"
        logits = "no logits"
        if self.kept_logits is not None:
            logits = f"logits {list(self.kept_logits.values.shape)}"
        captured = "captured nothing"
        calls = ["run.text"] if self.kept_logits is None else ["hk.ranks(run)", "run.text"]
        if len(self.sites):
            captured = f"captured {self.sites}"
            calls.insert(0, f"run[{str(self.sites[0])!r}]")
        text = f"Run({rows} of up to {max(self.lengths)} tokens; {logits}; {captured})"
        return describe_outcome(text, *calls)


class CaptureStore:
    """The captures and firings of the bound hooks of one block, by text.

    Owned by the manager of the block. It also owns the state in the bound hooks: their `pieces`
    are those of the current text.
    """

    def __init__(self, bound_hooks: Sequence[BoundHook]) -> None:
        self.bound_hooks = bound_hooks
        self.current_text: SequenceBatch | None = None  # the text of the last forward
        self.firings: list[Firing] = []
        # of each text in the order in which the texts began: a list for each bound hook
        self._chunks: dict[SequenceBatch, list[list[CapturedChunk]]] = {}
        self._endings: dict[SequenceBatch, SequenceEnd] = {}  # of the texts that have ended
        self._finished: dict[SequenceBatch, Captures] = {}
        self._problem: str | None = None
        for bound_hook in bound_hooks:
            bound_hook.pieces, bound_hook.fired, bound_hook.last_pass = [], 0, None

    def turn_to(self, text: SequenceBatch) -> None:
        """Makes this text the one to which captures are added."""
        if text is self.current_text:
            return
        self.current_text = text
        if text not in self._chunks:
            self._chunks[text] = [[] for _ in self.bound_hooks]
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            bound_hook.pieces = chunks

    def finish(self, text: SequenceBatch, ending: SequenceEnd) -> None:
        """Ends a text. Its captures are joined when they are first read."""
        if text not in self._chunks or text in self._finished:
            return
        self._endings[text] = ending
        self._finished[text] = self._captures(text, ending)
        if self._problem is None:
            self._problem = _unreached_message(self.bound_hooks, text, ending)
        if text is self.current_text:
            self._leave_text()

    def finish_all(self) -> None:
        """Ends each text that no `generate` has ended."""
        for text in list(self._chunks):
            self.finish(text, _plain_ending(text))

    def forget(self, text: SequenceBatch) -> None:
        """Drops a text that was interrupted."""
        self._chunks.pop(text, None)
        self._leave_text()

    def _leave_text(self) -> None:
        self.current_text = None
        for bound_hook in self.bound_hooks:
            bound_hook.pieces = []

    def texts(self) -> list[Captures]:
        """Returns the captures of the user's hooks by text; open texts as if they ended now."""
        texts = []
        for text in self._chunks:
            if text in self._finished:
                texts.append(self._finished[text])
            elif not text.generating:
                texts.append(self._captures(text, _plain_ending(text)))
        return texts

    def observed(self) -> Captures:
        """Returns the captures of the observers in the first text, after its end."""
        text = next(iter(self._chunks))
        return self._captures(text, self._endings[text], observers=True)

    def _captures(
        self, text: SequenceBatch, ending: SequenceEnd, *, observers: bool = False
    ) -> Captures:
        slots, ended = [], []
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            hook, site = bound_hook.hook, bound_hook.site
            if not isinstance(hook, Capture) or bound_hook.observer is not observers:
                continue
            own_text, own_ending = text, ending
            if bound_hook.stack in text.stacks and chunks:
                own_text = text.stacks[bound_hook.stack]
                own_ending = _plain_ending(own_text)
            if any(_acts_before_end(chunk.cells, own_ending) for chunk in chunks):
                join = partial(_join_chunks, hook, site, list(chunks), own_text, own_ending)
                slots.append(LazyCapture(site, hook.name, join))
            elif chunks:  # all that was captured is the padding of rows that had ended
                ended.append(site)
        return Captures(tuple(slots), tuple(dict.fromkeys(ended)))

    def check_fired(self, forwards: int) -> None:
        """Raises `NeverFired` for the first hook that did nothing, or not all that it was to do."""
        fired, undecided = self._fired_and_undecided()
        for bound_hook in self.bound_hooks:
            if bound_hook in undecided - fired:
                raise NeverFired(
                    f"{bound_hook.hook} never acted at {bound_hook.site}: its condition reads what "
                    "the model computes later, so that it acts from the next token on, and none "
                    "came. Generate more tokens, or read at an earlier site"
                )
            if bound_hook not in fired:
                raise NeverFired(_never_fired_message(bound_hook, forwards))
        if self._problem is not None:
            raise NeverFired(self._problem)

    def _fired_and_undecided(self) -> tuple[set[BoundHook], set[BoundHook]]:
        """Returns the hooks that acted before the end of some row, and those with a condition that
        was not decided."""
        fired: set[BoundHook] = set()
        undecided: set[BoundHook] = set()
        for bound_hook, _, selection, _, _, outcome in self.firings:
            if bound_hook not in fired and _acts_before_end(selection, self._ending(selection)):
                is_decided = outcome is None or bool(outcome.decided.any())
                (fired if is_decided else undecided).add(bound_hook)
        return fired, undecided

    def _ending(self, selection: Selection | None) -> SequenceEnd | None:
        """How the text of a selection ended; None if it has not ended, or has no positions."""
        return None if selection is None else self._endings.get(selection.text)

    def log(self) -> pd.DataFrame:
        """Returns one row for each hook, site, forward and row of the batch where a hook fired.

        Columns: hook (its number, in the order in which the hooks were passed), do, site, forward,
        row, positions ("0-14"), numbers (how many the hook read or wrote), changed (how many of
        those an edit changed; 0 for a capture), held (those positions at which the condition of
        an edit held; all of them without a condition) and reason (what the condition read where it
        did not hold; "" if it held everywhere). Observers are left out.
        """
        table: list[list[object]] = []
        for firing in self.firings:
            bound_hook, forward, selection, *_ = firing
            if not bound_hook.observer:
                subject = [bound_hook.number, str(bound_hook.hook), str(bound_hook.site), forward]
                for facts in _log_of_rows(firing, self._ending(selection)):
                    table.append([*subject, *facts])
        return pd.DataFrame(table, columns=LOG_COLUMNS)


def _log_of_rows(firing: Firing, ending: SequenceEnd | None) -> Iterator[tuple[Any, ...]]:
    """The last six columns of the log: from row to reason."""
    _, _, selection, shape, changed, outcome = firing
    if selection is None:
        yield -1, "", shape.numel(), 0 if changed is None else int(changed), "", ""
        return
    counts = [[0]] * len(selection.rows) if changed is None else changed.tolist()
    rows = zip(selection.rows, selection.prompts, selection.row_positions, counts, strict=True)
    for index, (row, prompt, all_positions, row_counts) in enumerate(rows):
        positions = _before_end(all_positions, row, ending)
        if not positions:
            continue
        count, held_positions, reason = len(positions), _positions_text(positions), ""
        if outcome is not None:
            held_positions = _positions_text(outcome.held(index, positions))
            reason = outcome.reason(index, count)
        numbers, n_changed = count * shape.numel(), sum(row_counts[:count])
        yield prompt, _positions_text(positions), numbers, n_changed, held_positions, reason


def _plain_ending(text: SequenceBatch) -> SequenceEnd:
    return SequenceEnd(range(len(text.lengths) * text.expand))


def _join_chunks(
    hook: Capture,
    site: AnySite,
    chunks: list[CapturedChunk],
    text: SequenceBatch,
    ending: SequenceEnd,
) -> Captured:
    first = chunks[0]
    if first.cells is None:
        return Captured(site, hook.where, first.values, None, (), (), hook.name)
    is_scores = isinstance(site, Site) and site.name.endswith("scores")
    fill = unseen_value(first.values.dtype, is_scores)
    values, positions, final_rows = join_chunks(chunks, ending, fill)
    values = swap_head_and_query(site, values) if first.leaf is None else first.leaf
    rows_per_prompt = text.expand if ending.limits is None else 1
    rows = tuple(ending.prompts[row] // rows_per_prompt for row in final_rows)
    prompts = tuple(map(text.prompt, rows))
    return Captured(site, hook.where, values, positions, rows, prompts, hook.name)


def _before_end(positions: PositionRange, row: int, ending: SequenceEnd | None) -> PositionRange:
    """The positions before the end of a model row.

    A row that has ended is given padding while the other rows continue.
    """
    limit = None if ending is None else ending.limit(row)
    if limit is None:
        return positions
    return positions[: bisect_left(positions, limit)]


def _acts_before_end(selection: Selection | None, ending: SequenceEnd | None) -> bool:
    if selection is None or ending is None or ending.limits is None:
        return True
    rows = zip(selection.row_positions, selection.rows, strict=True)
    return any(_before_end(positions, row, ending) for positions, row in rows)


def _positions_text(positions: Sequence[int]) -> str:
    """Positions as text: "3", "0-14", "2,5,7"."""
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
        return f"{positions[0]}-{positions[-1]}"
    return ",".join(map(str, positions))


# ---- hooks that did not fire


def _unreached_message(
    bound_hooks: Iterable[BoundHook], text: SequenceBatch, ending: SequenceEnd
) -> str | None:
    """The message for the first position of a hook that the text did not reach; None if none."""
    for bound_hook in one_per_selection(bound_hooks):
        if bound_hook.stack in text.stacks:
            continue
        positions_by_prompt = text.selected_positions(bound_hook.where)
        for number, row in enumerate(ending.prompts):
            if ending.limits is None:
                positions = positions_by_prompt[row // text.expand]
                reached = text.reached(row, head=bound_hook.head)
            else:
                positions = positions_by_prompt[row]
                reached = range(ending.limits[number])
            if isinstance(positions, tuple) and positions[-1] not in reached:
                return (
                    f"{bound_hook.hook} at {bound_hook.site} means position {positions[-1]} of row "
                    f"{row}, and the text ended before it came there (positions "
                    f"{first_to_last(reached)})"
                )
    return None


def one_per_selection(bound_hooks: Iterable[BoundHook]) -> Iterable[BoundHook]:
    """Returns one bound hook for each selection: a hook selects the same at all its sites."""
    by_selection: dict[tuple[int, bool, str], BoundHook] = {}
    for bound_hook in bound_hooks:
        key = id(bound_hook.where), bound_hook.head, bound_hook.stack
        by_selection[key] = bound_hook
    return by_selection.values()


def first_to_last(positions: range) -> str:
    """Returns positions as text for a message."""
    return f"{positions[0]} to {positions[-1]}" if positions else "none"


def _never_fired_message(bound_hook: BoundHook, forwards: int) -> str:
    subject = f"{bound_hook.hook} never fired at {bound_hook.site}"
    if not forwards:
        return f"{subject}: no forward of the model ran inside the block"
    ran = "1 forward ran" if forwards == 1 else f"{forwards} forwards ran"
    if bound_hook.fired:
        return (
            f"{subject} before a row's end, though {ran}: the rows that it means had ended before "
            "they came to its positions or steps. Look at run.log, and at the lengths of the rows; "
            "leave those rows out with rows="
        )
    return (
        f"{subject}, though {ran}: either its positions, rows or steps did not come, or the model "
        "never calls this module (some are bypassed by fused code). Look at run.log, and at "
        "lm.describe() for the sites"
    )
