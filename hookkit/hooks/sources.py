"""Edits of logits with a source: `toward` and `away_from`.

A source is another distribution of the same next token: that of another model, of the model after
another prompt, of the model without the run's hooks, or of an earlier layer. The edit adds
by · (log p_source - log p) to the logits, or subtracts it. How a source is read while the model
runs is in `hookkit.runs.source_readers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..arguments import check_keywords, check_number, describe, shorten
from ..errors import BadHook, BadPrompt, Unsupported
from ..models.chat import Chat
from ..models.lm import LM
from ..models.positions import IndicesLike, PosLike
from ..models.prompt_row import Row, has_inputs
from ..models.prompts import check_prompts
from ..models.sites import ModuleSite, Site, Sites, as_sites, has_name
from .base import Binding, Change, Constant, EditContext, When, as_constant, as_where, set_field
from .logits import LogitEdit, Logits

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")  # the sites that a lens reads
LOGITS = as_sites("logits")


@dataclass(frozen=True)
class OtherModel:
    """Another model of the same vocabulary, which reads the row's own text."""

    lm: LM

    def __post_init__(self) -> None:
        if not isinstance(self.lm, LM):
            raise BadHook(f"a source holds {describe(self.lm)} where a model is meant")

    def __repr__(self) -> str:
        return self.lm.name or type(self.lm.root).__name__

    def in_words(self) -> str:
        return f"the model {self!r}"


@dataclass(frozen=True)
class OtherPrompts:
    """The model after another prompt: one for all rows, or one for each row of the batch."""

    prompts: tuple[str | Chat | Row, ...]

    def __post_init__(self) -> None:
        try:
            prompts = tuple(check_prompts(self.prompts))
        except BadPrompt as error:
            raise BadHook(
                f"{describe(self.prompts)} is no source: give a prompt, a list of one for each "
                "row, another model (hk.LM), hk.UNEDITED, or a layer, hk.Site('resid_post', 6): "
                f"{error}"
            ) from error
        if any(has_inputs(prompt) for prompt in prompts if not isinstance(prompt, str | Chat)):
            raise BadHook("a source's prompt has more than tokens: give text, a chat or token ids")
        set_field(self, "prompts", prompts)

    def __repr__(self) -> str:
        return repr(list(self.prompts)) if len(self.prompts) > 1 else repr(*self.prompts)

    def in_words(self) -> str:
        if len(self.prompts) > 1:
            return "another prompt for each row"
        return f"the prompt {shorten(repr(self))}"


@dataclass(frozen=True)
class Unedited:
    """The model itself, on the row's own text, without any hook. `hk.UNEDITED` is the value."""

    def __repr__(self) -> str:
        return "UNEDITED"

    def in_words(self) -> str:
        return "the unedited model"


UNEDITED = Unedited()


@dataclass(frozen=True)
class EarlierLayer:
    """A state of the residual stream in the same forward, as the model's own end reads it.

    `change` and `offset` are those of a tuned lens at the site; None for the logit lens.
    """

    site: Site
    change: Constant | None = None
    offset: Constant | None = None

    def __post_init__(self) -> None:
        site = self.site
        if not has_name(site, *STREAM) or site.stack or site.every_layer:
            raise BadHook(
                f"{describe(str(site))} is no source: a layer is one state of the residual stream, "
                "such as hk.Site('resid_post', 6)"
            )

    def __repr__(self) -> str:
        return str(self.site) if self.change is None else f"{self.site}, lens=tuned"

    def in_words(self) -> str:
        return str(self.site)


Source: TypeAlias = OtherModel | OtherPrompts | Unedited | EarlierLayer


def as_source(source: Any, lens: Any = None) -> Source:
    """Returns a source from the value that a user passes. Raises `BadHook` for other values."""
    if isinstance(source, Sites) and len(source) == 1:
        (source,) = source
    if isinstance(source, Site | ModuleSite | Sites):
        return _as_layer(source, lens)
    if lens is not None:
        raise BadHook("lens= reads a layer, and the source is none: hk.Site('resid_post', 6)")
    if isinstance(source, LM):
        return OtherModel(source)
    if isinstance(source, OtherModel | OtherPrompts | Unedited | EarlierLayer):
        return source
    if isinstance(source, nn.Module):
        raise BadHook("the source is a model without its tokens: give hk.LM(model, tokenizer)")
    return OtherPrompts(source)


def _as_layer(site: Any, lens: Any) -> EarlierLayer:
    if lens is None:
        return EarlierLayer(site)
    change, offset = getattr(lens, "change", None), getattr(lens, "offset", None)
    if change is None or offset is None:
        raise BadHook(f"lens={describe(lens)} is no tuned lens: give what hk.train_lens returned")
    if str(site) not in change:
        raise BadHook(f"this tuned lens was not trained at {site}: it has {', '.join(change)}")
    translator = as_constant(change[str(site)], "change"), as_constant(offset[str(site)], "offset")
    return EarlierLayer(site, *translator)


@dataclass(frozen=True)
class SourceEdit(LogitEdit, puts_in=True):
    """Adds a multiple of log p_source - log p to the logits. `toward` and `away_from` return it."""

    source: Source
    by: float
    plausible: float | None = None

    sign: ClassVar[float] = 1.0
    phrase: ClassVar[str] = ""  # how tables name the edit

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    def check_sites(self) -> None:
        if self.sites != LOGITS:
            raise BadHook(f"{self.verb} acts at 'logits', where a source speaks, not {self.sites}")

    def check(self) -> None:
        super().check()
        if not isinstance(self.source, OtherModel | OtherPrompts | Unedited | EarlierLayer):
            raise BadHook(f"{self.verb} holds {describe(self.source)}, which is no source")
        set_field(self, "by", check_number(self.by, "by"))
        if self.plausible is not None:
            plausible = check_number(self.plausible, "plausible", least=0.0, most=1.0)
            set_field(self, "plausible", plausible or None)

    def in_words(self) -> str:
        """Returns what the edit does, for the sentences of `decisions`."""
        return f"{self.phrase} {self.source.in_words()}"

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        read = binding.read_source
        if read is None:
            raise Unsupported(
                f"{self} has a source, which is read in hk.forward, hk.generate and hk.attach "
                "only: not in a sweep, a lens or an exported processor"
            )

        def apply(logits: Logits, here: EditContext) -> Logits:
            mask = here.condition_mask
            if mask is not None and not bool(mask.any()):
                return logits
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return self._contrast(exact, read(here).to(exact)).to(logits.dtype)

        return apply

    def _contrast(self, logits: Logits, source: Float[Tensor, "row pos source_vocab"]) -> Logits:
        # models of one vocabulary may differ in the rows after it, which are no tokens
        width = min(logits.shape[-1], source.shape[-1])
        difference = source.log_softmax(-1)[..., :width] - logits.log_softmax(-1)[..., :width]
        new = logits.clone()
        new[..., :width] += self.sign * self.by * difference
        impossible = logits == -math.inf
        if self.plausible is not None:
            limit = logits.amax(-1, keepdim=True) + math.log(self.plausible)
            impossible = impossible | (logits < limit)
        return new.masked_fill(impossible, -math.inf)


@dataclass(frozen=True)
class Toward(SourceEdit, verb="toward", bare=("source",), sign=1.0, phrase="the pull toward"):
    """Moves the logits toward a source. `toward` returns it."""


@dataclass(frozen=True)
class AwayFrom(SourceEdit, verb="away_from", bare=("source",), sign=-1.0, phrase="contrast with"):
    """Moves the logits away from a source. `away_from` returns it."""


@check_keywords
def toward(
    source: Any,
    *,
    by: float,
    plausible: float | None = None,
    lens: Any = None,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
) -> Toward:
    """Adds by · (log p_source - log p) to the logits: by=1 gives the source's own distribution.

    The source is one of

    - another model of the same vocabulary, an `hk.LM`, which reads the row's own text;
    - another prompt, one for all rows or a list of one for each row: the model reads it, and then
      the tokens that the row itself generates;
    - `hk.UNEDITED`, the model itself without any hook: by=1 undoes all earlier edits, and
      `away_from` amplifies them;
    - an earlier layer of the same forward, such as hk.Site("resid_post", 6), read by the model's
      own end, or through a tuned lens (`lens=`).

    With `plausible`, tokens whose probability (before this edit) is below that share of the largest
    one become impossible; by default (None, or 0) none do. Tokens that were impossible before stay
    so. The source is read without gradients, except for a layer, which is a part of the forward.

    Each source has its own cache, and reads in every forward what its rows have got since. With
    beams it reads the whole text again whenever the beams have changed places.

    Liu et al. 2021, "DExperts"; Li et al. 2022, "Contrastive Decoding" (arXiv 2210.15097).

    >>> print(toward("She drinks tea. I like", by=0.5))
    toward('She drinks tea. I like', by=0.5)
    """
    where = as_where(pos, rows, step)
    return Toward(LOGITS, where, as_source(source, lens), by, plausible, when=when)


@check_keywords
def away_from(
    source: Any,
    *,
    by: float,
    plausible: float | None = None,
    lens: Any = None,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
) -> AwayFrom:
    """Subtracts by · (log p_source - log p) from the logits. The sources are those of `toward`.

    With a prompt without some document or instruction this is classifier-free guidance (Sanchez et
    al. 2023, arXiv 2306.17806; transformers' guidance_scale is 1 + by) and context-aware decoding
    (Shi et al. 2023, arXiv 2305.14739), with a smaller model contrastive decoding (arXiv
    2210.15097, which has plausible=0.1), and with an earlier layer DoLa (Chuang et al. 2023, arXiv
    2309.03883).

    >>> print(away_from(hk.Site("resid_post", 6), by=1.0, plausible=0.1))
    away_from(resid_post.6, by=1.0, plausible=0.1)
    """
    where = as_where(pos, rows, step)
    return AwayFrom(LOGITS, where, as_source(source, lens), by, plausible, when=when)
