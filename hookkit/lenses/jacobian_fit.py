"""Fits a Jacobian lens: one forward of some texts, and one backward for each row of the Jacobian.

The texts are read by the machinery of `harvest`: in one pass, in batches that follow from the texts
and the settings alone, so that a fit that was interrupted continues with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_integers
from ..data.harvest.folder import describe_model as describe_values
from ..data.harvest.folder import flatten, refuse_other_settings
from ..data.harvest.stored_values import Progress
from ..data.harvest.texts import Batch, TextReader, TextsLike, read_rules
from ..errors import BadFile, BadHook, EmptySelection, HarvestChanged, OutOfRange, Unsupported
from ..files.untrusted import check_path, read_tensors
from ..hooks.capture import Captured, capture
from ..hooks.vector import describe_model
from ..models.lm import LM, refuse_no_gradient
from ..models.model_setup import freeze_weights
from ..models.sites import Site
from ..models.words import WordLike
from ..runs.forward import forward
from ..runs.model_end import model_end_of
from ..tables.rank_tables import watched_ids
from .jacobian_lens import JacobianLens, read_jacobian, token_directions

CAPTURE_NAME = "hookkit.jacobian"
# what a fit needs to continue, beside the sums
PROGRESS = ("text", "piece", "stream", "window", "batches", "left_out", "lengths")


@check_arguments
def fit_jacobian(
    lm: LM,
    texts: TextsLike,
    *,
    layers: int | Iterable[int] | None = None,
    tokens: Iterable[WordLike] | WordLike | None = None,
    window: int = 128,
    skip: int = 16,
    batch_tokens: int = 2048,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> JacobianLens:
    """A Jacobian lens for this model: how its last residual stream changes with that of each layer.

    J is the mean over texts, and over the positions p of a text, of Σ d h_last[p'] / d h_layer[p]
    over p' ≥ p. The lens reads a state h as the model's own end reads J · h. p and p' are neither
    among the first `skip` positions, whose states are unlike others, nor the text's last one. This
    is the definition of the published lenses (Gurnee, Sofroniew, Lindsey et al. 2026, "Verbalizable
    Representations Form a Global Workspace in Language Models"; anthropics/jacobian-lens). They
    read the first 128 tokens of a text; here a longer text is cut into pieces of `window` tokens,
    each of which counts as a text. Pieces of fewer than `skip` + 2 tokens are left out, and
    counted in `about`.

    `layers` are blocks, by default all but the last, whose Jacobian is the identity. A text costs a
    backward for each dimension. With `tokens`, it costs one for each token, for all layers: then
    the lens has the rows W_U[token] · J only, for `rank_tokens`, `vector` and `swap_concept`.

    `texts` is an iterable of texts or the path of a file of them, as in `harvest`; `batch_tokens`
    the number of tokens that run together. With `path`, the lens is written there after each
    batch, and a fit that was interrupted continues with the same numbers. `HarvestChanged` is
    raised if the texts or the settings are others. Lenses of different texts are joined by `merge`.

    >>> small = hk.tiny("llama")
    >>> texts = [list(range(2, 40)), list(range(50, 90))]
    >>> lens = fit_jacobian(small, texts, tokens=[7, 9], progress=False)
    >>> lens.table[["site", "texts"]].values.tolist()
    [['resid_post.0', 2], ['resid_post.1', 2]]
    """
    refuse_no_gradient(lm)
    _refuse_other_models(lm)
    check_integer(skip, "skip", least=0, meaning="how many positions are left out,", error=BadHook)
    check_integer(window, "window", least=skip + 2, error=BadHook)
    sites = _sites_of_layers(lm, layers)
    ids = None if tokens is None else tuple(watched_ids(lm, tokens))
    if ids == ():
        raise EmptySelection("tokens=[] names none: name at least one, or leave tokens out")
    context = min(window, lm.context or window)
    rules = read_rules(lm, slice(skip, -1), context, "split", "error", batch_tokens)
    settings = {
        "model": describe_values(lm),
        "sites": list(map(str, sites)),
        "tokens": None if ids is None else list(ids),
        "window": context,
        "skip": skip,
        "batch_tokens": batch_tokens,
    }
    file = None if path is None else check_path(path)
    reader = TextReader(lm, texts, rules)
    with Progress(reader, progress) as bar:
        fit = JacobianSum(lm, sites, ids, settings)
        if file is not None and file.exists():
            fit.resume(file)
        fit.read(reader, bar, file)
        lens = fit.lens(reader.left_out)
        if file is not None:
            lens.save(file)
    return lens


def _refuse_other_models(lm: LM) -> None:
    kind = type(lm.root).__name__
    if lm.two_texts or not lm.n_layers or "resid_post" not in lm.layout.names:
        raise Unsupported(
            f"{kind} has no single stack of known blocks that reads a text, from whose layers a "
            "Jacobian could go to the last one"
        )
    if lm.ranks is not None:
        raise Unsupported(
            f"this {kind} is held by {lm.ranks.count} processes together, and a Jacobian is "
            "computed in one: load it without tp_plan"
        )


def _sites_of_layers(lm: LM, layers: int | Iterable[int] | None) -> tuple[Site, ...]:
    numbers = list(range(lm.n_layers - 1))
    if layers is not None:
        numbers = check_integers(layers, "layers", least=0, meaning="blocks, counted from 0,")
    if not numbers or max(numbers) >= lm.n_layers:
        raise OutOfRange(
            f"layers={numbers} were asked for, and the model has the layers 0 to {lm.n_layers - 1}"
        )
    return tuple(Site("resid_post", number) for number in sorted(numbers))


@dataclass(eq=False)
class JacobianSum:
    """The Jacobians of the texts that were read so far. `fit_jacobian` owns it.

    `text`, `piece` and `stream` are those of the last sequence of the windows that are complete,
    `batches` the number of batches of the next one that are done, and `window` its own stream.
    """

    lm: LM
    sites: tuple[Site, ...]
    tokens: tuple[int, ...] | None
    settings: dict[str, Any]
    counts: list[int] = field(default_factory=lambda: [0, 0])
    text: int = -1
    piece: int = 0
    stream: str = ""
    window: str = ""
    batches: int = 0
    left_out: int = 0

    def __post_init__(self) -> None:
        self.end = Site("resid_post", self.lm.n_layers - 1)
        width = self.lm.shape(self.end)[0]
        self.directions, self.bias = torch.eye(width), False
        if self.tokens is not None:
            self.directions = token_directions(self.lm, self.tokens)
            self.bias = _has_bias(self.lm, width, self.tokens)
        shape = 2, len(self.directions), width
        self.sums = {str(site): torch.zeros(shape) for site in self.sites}
        self.lengths = dict.fromkeys(self.sums, 0.0)

    def resume(self, file: Path) -> None:
        """Takes the sums of a fit that was interrupted, after checking its settings."""
        tensors, words = read_tensors(file)
        name = f"the lens in {str(file)!r}"
        if "jacobian" not in words:
            raise BadFile(f"{str(file)!r} is no Jacobian lens: give the path of a new file")
        lens = read_jacobian(tensors, words["jacobian"], name, None)
        old, progress = lens.about.get("settings"), lens.about.get("progress")
        progress = progress if isinstance(progress, dict) else {}
        if not isinstance(old, dict) or not set(PROGRESS) <= set(progress):
            raise BadFile(f"{name} was merged, and no fit continues it: give another path")
        refuse_other_settings(file, "a lens", dict(flatten(old)), dict(flatten(self.settings)))
        self.sums = {site: sums.clone() for site, sums in lens.sums.items()}
        self.counts = list(lens.counts)
        for name in PROGRESS:
            setattr(self, name, progress[name])

    def read(self, reader: TextReader, bar: Progress, file: Path | None) -> None:
        """Adds the texts that are missing, and writes the lens after each batch."""
        if self.text >= 0:
            reader.skip(self.text, self.piece, self.stream)
            bar.skip_to(self.text)
        while window := reader.read_window():
            last = window.sequences[-1]
            if self.batches and last.stream != self.window:
                break
            self.window = last.stream
            for batch in window.batches(reader.rules)[self.batches :]:
                self.add(batch)
                self.batches += 1
                bar.add(batch)
                if file is not None:
                    self.lens(0).save(file)
            self.text, self.piece, self.stream = last.text, last.piece, last.stream
            self.batches, self.left_out = 0, self.left_out + window.left_out
            bar.advance_to(last.text)
        self._check_complete(reader)

    def _check_complete(self, reader: TextReader) -> None:
        """Raises if the texts are others than before, or if none of them is long enough."""
        if self.batches:  # of a window that did not come again
            raise HarvestChanged(
                f"the texts after number {self.text} are not those that the lens was made from: "
                "give the same texts in the same order to go on, or fit another lens of the new "
                "ones and merge both"
            )
        if not sum(self.counts):
            raise EmptySelection(
                f"none of the {reader.text + 1} texts has {self.settings['skip'] + 2} tokens: give "
                "longer ones, or a smaller skip="
            )

    def add(self, batch: Batch) -> None:
        """Adds the Jacobians of a batch."""
        lm, prompts = self.lm, [sequence.ids for sequence in batch.sequences]
        captured_sites = list(dict.fromkeys((*self.sites, self.end)))
        captures = capture(captured_sites, grad=True, name=CAPTURE_NAME)
        with torch.inference_mode(False), torch.enable_grad(), freeze_weights(lm.model):
            run = forward(lm, prompts, captures, logits=False)
            end = run.captured(self.end, CAPTURE_NAME)
            states = [run.captured(site, CAPTURE_NAME).values for site in self.sites]
            weights = self._weights(batch, end).to(end.values.device)
            rows = _rows_of_jacobian(end.values, states, weights, self.directions)
        for site, state, jacobian in zip(self.sums, states, rows, strict=True):
            if not bool(jacobian.isfinite().all()):
                raise Unsupported(
                    f"the Jacobian at {site} is not finite for {batch}: run the model in float32"
                )
            self.sums[site] += jacobian
            lengths = state.detach().float().norm(dim=-1)
            self.lengths[site] += float((weights.sum(0).to(lengths) * lengths).sum())
        for sequence in batch.sequences:
            self.counts[(sequence.text + sequence.piece) % 2] += 1

    def _weights(self, batch: Batch, end: Captured) -> Float[Tensor, "half row pos"]:
        """Returns 1 / number of positions at the averaged positions of each half's texts."""
        assert end.positions is not None
        weights = torch.zeros(2, *end.positions.shape)
        for row, sequence in enumerate(batch.sequences):
            positions = end.positions[row]
            inside = (positions >= sequence.positions[0]) & (positions <= sequence.positions[-1])
            weights[(sequence.text + sequence.piece) % 2, row, inside] = 1 / sequence.rows
        return weights

    def lens(self, left_out: int) -> JacobianLens:
        """Returns the lens of the texts so far."""
        total = sum(self.counts)
        about = {
            **describe_model(self.lm),
            "texts": total,
            "left_out": self.left_out + left_out,
            "skip": self.settings["skip"],
            "bias": self.bias,
            "settings": self.settings,
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        directions = None if self.tokens is None else self.directions
        lengths = {site: length / total for site, length in self.lengths.items()}
        counts = tuple(self.counts)
        return JacobianLens(self.sums, counts, lengths, self.tokens, directions, about, self.lm)


def _has_bias(lm: LM, width: int, ids: Iterable[int]) -> bool:
    """True if the end of the model gives these tokens other logits than 0 for a state of zeros."""
    dtype = getattr(lm.root, "dtype", torch.float32)
    zeros = torch.zeros(1, width, dtype=dtype, device=lm.device)
    with torch.no_grad():
        logits = model_end_of(lm, (), ()).logits(zeros)[0, list(ids)]
    return bool((logits != 0).any())


def _rows_of_jacobian(
    end: Float[Tensor, "row pos d_model"],
    states: list[Tensor],
    weights: Float[Tensor, "half row pos"],
    directions: Float[Tensor, "direction d_model"],
) -> list[Float[Tensor, "half direction d_model"]]:
    """Returns for each site the weighted gradients of each direction in the last state."""
    is_target = weights.sum(0).gt(0)[..., None].to(end)
    parts: list[list[Tensor]] = [[] for _ in states]
    for direction in directions.to(end):
        outward = is_target * direction
        gradients = torch.autograd.grad(end, states, outward, retain_graph=True)
        for part, gradient in zip(parts, gradients, strict=True):
            part.append(torch.einsum("hrp,rpd->hd", weights.to(gradient.device), gradient.float()))
    return [torch.stack(part, 1).cpu() for part in parts]
