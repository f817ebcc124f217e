"""Reads the sources of `hk.toward`, `hk.away_from` and `hk.swap_concept` while the model runs.

A `TextReader` runs a model on a text of its own, beside the rows of the run: another model, or the
model itself after another prompt or without hooks. It has its own cache, to which it adds the
tokens that its rows have got since. Whether the cache is that of its rows is decided by their
tokens alone, so that it is right for whatever called it: with another order of rows, or another
text, it reads all of the text again. It gives logits, or the states at some sites. A `LayerReader`
applies the model's own end to a state of the same forward.

No hook of hookkit acts in a reader's forwards, and none is registered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, BadPrompt, OtherVocabulary, Unsupported
from ..hooks.base import EditContext
from ..hooks.concepts import SwapConcept
from ..hooks.sources import EarlierLayer, OtherModel, OtherPrompts, SourceEdit
from ..models.batch_positions import ForwardPass, Selection, pad_rows
from ..models.lm import LM, logits_of
from ..models.named_positions import placeholder_ids
from ..models.overrides import Overrides, turn_hooks_off
from ..models.padding import PaddingScheme, can_pad, padding_scheme
from ..models.prompt_row import Row
from ..models.prompts import as_batch, as_rows, refuse_inputs
from ..models.sites import Site
from ..models.tokens import different_tokens
from .tracking import cache_of

SourceLogits: TypeAlias = Float[Tensor, "row pos vocab"]
SourceStates: TypeAlias = Float[Tensor, "row pos site d_model"]


@dataclass(eq=False)
class ReadText:
    """What a model has read of some rows, padded on the left, and the cache that it has left."""

    rows: list[Row]
    ids: Tensor
    positions: Tensor
    scheme: PaddingScheme
    cache: Any


@dataclass(eq=False)
class TextReader:
    """Reads a model on texts of its own. Owned by the `BoundHook` of the edit.

    `prompts` take the place of the rows' own prompts: one for all rows or one for each; None for
    the rows' own. With `sites`, their states are read and not the logits. `last` is what was read
    last, for a trace and for the next site of the same forward.
    """

    hook: SourceEdit | SwapConcept
    lm: LM
    prompts: tuple[Row, ...] | None = None
    sites: tuple[Site, ...] = ()
    last: tuple[Selection, SourceLogits | SourceStates] | None = None
    text: ReadText | None = None

    def __call__(self, here: EditContext) -> SourceLogits | SourceStates:
        """Returns the source's logits or states at the cells of an edit."""
        if self.last is not None and self.last[0] is here.cells:
            return self.last[1]
        rows, indices = self._texts(here)
        n_unread = [len(row) - index[0] for row, index in zip(rows, indices, strict=True)]
        generating = here.cells.text.generating
        logits = self._continue(rows, max(n_unread)) if generating else None
        left = True
        if logits is None:
            left = generating or can_pad(self.lm, "left", rows)
            logits = self._read_all(rows, max(n_unread), left=left, generating=generating)
        logits = _at_indices(logits, rows, indices, left=left)
        self.last = here.cells, logits
        return logits

    def release(self) -> None:
        """Drops the cache, after the last forward."""
        self.text = self.last = None

    def _texts(self, here: EditContext) -> tuple[list[Row], list[list[int]]]:
        """Returns for each row what the source reads, and the index in it of each cell."""
        rows: list[Row] = []
        indices: list[list[int]] = []
        for number, prompt in enumerate(here.rows):
            prompt_ids = here.cells.text.prompt(prompt)
            self._check_own(prompt_ids)
            start = self._prompt(prompt, len(here.cells.text.lengths), prompt_ids)
            positions = here.cells.row_positions[number]
            if self.prompts is not None and positions[0] < len(prompt_ids) - 1:
                raise Unsupported(
                    f"{self.hook} means position {positions[0]} of row {prompt}, inside its "
                    "prompt, where another prompt has no tokens of its own: give positions from "
                    "the prompt's last token on, or step=0"
                )
            count = positions[-1] - len(prompt_ids) + 1
            generated = here.read(number, positions[-1], count) if count > 0 else []
            rows.append((*start, *generated))
            indices.append([len(start) + position - len(prompt_ids) for position in positions])
        return rows, indices

    def _check_own(self, row: Row) -> None:
        refuse_inputs([row], self.hook.verb)
        if self.prompts is None and -1 in row:
            raise Unsupported(
                f"{self.hook} reads the tokens of each row, and these are not known: the prompt "
                "was given as embeddings, or in a cache that was filled outside the block"
            )
        if placeholder_ids(self.lm).intersection(row):
            raise Unsupported(
                f"{self.hook} reads tokens only, and the prompt has an image, a video or sound"
            )

    def _prompt(self, row: int, count: int, own: Row) -> Row:
        if self.prompts is None:
            return tuple(own)
        own_rows = self.hook.where.rows == tuple(range(len(self.prompts)))
        if len(self.prompts) not in (1, count) and not own_rows:
            raise BadHook(
                f"{self.hook.verb} has {len(self.prompts)} prompts, and {count} rows run: give one "
                "for all rows, or one for each"
            )
        return self.prompts[row if len(self.prompts) > 1 else 0]

    # ---- forwards of the source

    def _continue(self, rows: list[Row], count: int) -> SourceLogits | None:
        """Returns the logits at the last `count` columns, from the cache.

        None if the cache is not that of these rows without their last tokens.
        """
        text = self.text
        if text is None or text.cache is None or len(rows) != len(text.rows):
            return None
        lengths = list(map(len, text.rows))
        starts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        new = [row[length:] for row, length in zip(rows, lengths, strict=True)]
        widths = set(map(len, new))
        if starts != text.rows or len(widths) > 1 or count > len(new[0]):
            return None
        self._check_context(rows)
        parts: list[Tensor] = []
        for tokens in zip(*new, strict=True):  # one at a time: not every cache takes several
            column = torch.tensor(tokens, device=text.ids.device)[:, None]
            text.ids = torch.cat([text.ids, column], dim=1)
            text.positions = torch.cat([text.positions, text.positions[:, -1:] + 1], dim=1)
            inputs = text.scheme.inputs(text.ids, text.positions, 1)
            parts.append(self._run(inputs, text, use_cache=True))
        text.rows = rows
        return torch.cat(parts[-count:], dim=1)

    def _read_all(
        self, rows: list[Row], count: int, *, left: bool, generating: bool
    ) -> SourceLogits:
        """Returns the logits of whole rows; padded on the left, at the last `count` columns."""
        side = "left" if left else "right"
        batch = as_batch(self.lm, rows, side=side)
        scheme = padding_scheme(self.lm, side, rows) if batch.padded else PaddingScheme()
        inputs = batch.inputs(self.lm)
        if generating:
            if scheme.positions is None and "position_ids" in self.lm.takes:
                scheme = replace(scheme, positions=0)  # as in transformers' generate
            inputs = scheme.inputs(batch.ids, batch.positions, batch.ids.shape[1])
        self.text = ReadText(rows, batch.ids, batch.positions, scheme, None)
        keep = count if left else 0
        return self._run(inputs, self.text, use_cache=generating, keep=keep)

    def _run(
        self, inputs: dict[str, Tensor], text: ReadText, *, use_cache: bool, keep: int = 0
    ) -> SourceLogits:
        if self.sites:
            keep = 1  # no logits are read
        settings = self.lm.accepted(use_cache=use_cache, return_dict=True, logits_to_keep=keep)
        if text.cache is not None:
            settings["past_key_values"] = text.cache
        with Overrides() as overrides, torch.no_grad():
            turn_hooks_off(overrides)
            states = _record_states(self.lm, self.sites, overrides)
            output = self.lm.model(**inputs, **settings)
        if use_cache and "past_key_values" in self.lm.takes:
            text.cache = cache_of(output)
        if self.sites:
            return torch.stack([states[site].to(self.lm.device) for site in self.sites], dim=2)
        return logits_of(output)

    def _check_context(self, rows: Sequence[Row]) -> None:
        longest = max(map(len, rows))
        if self.lm.context is not None and longest > self.lm.context:
            raise BadPrompt(
                f"{self.hook} has come to {longest} tokens, and its model's context is "
                f"{self.lm.context}: give a shorter prompt, or generate fewer tokens"
            )


def _record_states(lm: LM, sites: Sequence[Site], overrides: Overrides) -> dict[Site, Tensor]:
    """Returns a dict that the next forward fills with the outputs of the blocks of these sites."""
    from .dispatch import pick_output  # which imports this module

    states: dict[Site, Tensor] = {}

    def run_block(site: Site, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        states[site] = pick_output(output, lm.location(site))
        return output

    for site in sites:
        block = lm.submodule(lm.location(site).path)
        overrides.wrap_method(block, "forward", partial(run_block, site))
    return states


@dataclass(eq=False)
class LayerReader:
    """Reads a state of the same forward through the model's own end.

    Owned by the `BoundHook` of the edit. A second one, at the site of the state, calls `receive`.
    """

    hook: SourceEdit
    lm: LM
    layer: EarlierLayer
    last: tuple[Selection, SourceLogits] | None = None
    state: tuple[Selection, Tensor] | None = None
    model_end: Any = field(init=False)

    def __post_init__(self) -> None:
        from .model_end import model_end_of  # which registers hooks, and so imports the manager

        width = self.lm.shape(Site("resid_post", self.lm.n_layers - 1))
        change = self.layer.change
        shape = self.lm.shape(self.layer.site)
        if shape != width or (change is not None and change.tensor.shape != (*width, *width)):
            raise BadHook(
                f"{self.hook} reads {list(shape)} numbers, and the model's end takes "
                f"{list(width)}: give a layer of the stream, and a lens of this model"
            )
        self.model_end = model_end_of(self.lm, (), ())

    def receive(self, forward_pass: ForwardPass, cells: Selection, states: Tensor) -> None:
        """Called in each forward with the states at the positions of the edit."""
        self.state = cells, states

    def __call__(self, here: EditContext) -> SourceLogits:
        assert self.state is not None
        cells, states = self.state
        states = states[_index_of(cells, here.cells)]
        if self.layer.change is not None and self.layer.offset is not None:
            change, offset = self.layer.change.tensor, self.layer.offset.tensor
            states = states + states @ change.to(states) + offset.to(states)
        shape = states.shape
        with Overrides() as overrides:
            turn_hooks_off(overrides)
            logits = self.model_end.logits(states.reshape(-1, shape[-1]))
        logits = logits.reshape(*shape[:2], -1)
        self.last = here.cells, logits
        return logits

    def release(self) -> None:
        """Drops the state, after the last forward."""
        self.state = self.last = None


def _index_of(cells: Selection, some: Selection) -> tuple[Tensor, Tensor]:
    """Returns the indices [row, 1] and [row, pos] in `cells` of some of them; 0 in padding."""
    rows, columns = [], []
    for row, positions in zip(some.rows, some.row_positions, strict=True):
        number = cells.rows.index(row)
        rows.append([number])
        columns.append(list(map(cells.row_positions[number].index, positions)))
    return torch.tensor(rows), pad_rows(columns, 0)


Reader: TypeAlias = TextReader | LayerReader


def _at_indices(
    logits: SourceLogits, rows: Sequence[Row], indices: Sequence[Sequence[int]], *, left: bool
) -> SourceLogits:
    """Returns the logits at these indices into the rows, which are padded on the left or right."""
    columns: list[list[int]] = []
    for row, index in zip(rows, indices, strict=True):
        shift = logits.shape[1] - len(row) if left else 0
        columns.append([shift + number for number in index])
    cells = pad_rows(columns, 0).to(logits.device)
    return logits[torch.arange(len(rows), device=logits.device)[:, None], cells]


def reader_of(lm: LM, hook: SourceEdit | SwapConcept) -> Reader:
    """Returns the reader of an edit's source. Raises for a source that this model cannot have."""
    if isinstance(hook, SwapConcept):
        _check_model(lm, hook)
        return TextReader(hook, lm, sites=_states_of_blocks(lm, hook))
    source = hook.source
    reading = source.lm if isinstance(source, OtherModel) else lm
    for model in (lm, reading):
        _check_model(model, hook)
    if isinstance(source, EarlierLayer):
        lm.location(source.site)
        return LayerReader(hook, lm, source)
    if isinstance(source, OtherPrompts):
        prompts = tuple(map(tuple, as_rows(lm, list(source.prompts))))
        return TextReader(hook, lm, prompts)
    if reading is not lm:
        check_same_vocabulary(lm, reading, hook)
    return TextReader(hook, reading)


def _states_of_blocks(lm: LM, hook: SwapConcept) -> tuple[Site, ...]:
    """Returns the sites of the hook, each of which must be the output of a module."""
    sites = []
    for site in lm.expand(hook.sites):
        if not isinstance(site, Site) or lm.location(site).side != "output":
            raise Unsupported(f"{hook}: {site} is no output of a block of {type(lm.root).__name__}")
        sites.append(site)
    return tuple(sites)


def _check_model(lm: LM, hook: SourceEdit | SwapConcept) -> None:
    kind = type(lm.root).__name__
    if lm.config is None:
        raise Unsupported(f"{hook}: {kind} is no model of transformers, so no source can be read")
    if lm.two_texts:
        raise Unsupported(
            f"{hook}: {kind} is an encoder-decoder, whose source would be a pair of texts: edits "
            "with a source are for models that read one text"
        )
    if any("recurrent_states" in vars(module) for module in lm.root.modules()):
        raise Unsupported(
            f"{hook}: {kind} stores what it has read in its own modules, where a source's forward "
            "would overwrite it"
        )
    if lm.ranks is not None:
        raise Unsupported(
            f"{hook}: this {kind} is held by {lm.ranks.count} processes together, and a source is "
            "read in one: load it without tp_plan"
        )


def check_same_vocabulary(lm: LM, other: LM, hook: SourceEdit) -> None:
    """Raises `OtherVocabulary` if a token's id does not mean the same in both models."""
    if lm.n_tokens != other.n_tokens:
        raise OtherVocabulary(
            f"{hook}: the source has {other.n_tokens} tokens and the model {lm.n_tokens}, so that "
            "their probabilities do not belong to the same tokens: give a model of one vocabulary"
        )
    different = different_tokens(lm, other)
    for number, (token, source_token) in different.items():
        if number < lm.n_tokens:  # later ones are no tokens of the models
            raise OtherVocabulary(
                f"{hook}: the vocabularies differ in {len(different)} tokens: id {number} is "
                f"{token!r} in the model and {source_token!r} in the source: give a model of one "
                "vocabulary"
            )
