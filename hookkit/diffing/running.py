"""hk.diff: two models on the same prompts, and all that differs."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pandas as pd

from ..about import about_model, git_commit, versions
from ..arguments import checks_arguments, finite_number, read_tokens, whole_number
from ..errors import BadHook, OutOfRange
from ..hooks.logits import LogitEdit
from ..model import LM, Token
from ..positions import PosLike, Where, as_pos
from ..prompts import Prompts
from ..shifts.naming import Hooks, together
from ..sites import AnySite, Site, SitesLike
from .difference import Difference
from .pairing import STREAM, Around, Matched, Side, matched, reader_of, rows_of
from .reading import Asked, Reading


@checks_arguments
def diff(
    before: LM,
    after: LM,
    prompts: Prompts,
    *,
    hooks_before: Hooks = (),
    hooks_after: Hooks = (),
    while_before: Around | None = None,
    while_after: Around | None = None,
    sites: SitesLike | None = None,
    cka: SitesLike | bool = True,
    pos: PosLike = None,
    rank_pos: PosLike = -1,
    top: int = 10,
    watch: Iterable[Token] | Token = (),
    tolerance: float = 1e-4,
    shown: int = 3,
    names: tuple[str, str] | None = None,
    batch_tokens: int = 512,
    memory: int = 2**30,
) -> Difference:
    """Two models on the same prompts: what they say, where inside they part first, and how alike each site is.

    For a base model and a fine-tuned one, float32 and bfloat16, a model before and after an edit of its weights (of
    which one is a copy). Both read the same tokens: other vocabularies, tokenizers or token ids raise
    `OtherVocabulary`. One model in two states is given twice, with hooks on one side, or with a block around the
    forwards of one side: `while_before=model.disable_adapter` for an adapter of PEFT, off and on. Without either, the
    same model given twice raises `BadHook`.

    `sites` are compared, all vectors that both have unless given; `cka` chooses those whose linear CKA is taken (True:
    those of `sites`, or embed, attn_out, mlp_out, resid_post and final_norm; False: none). `pos` are the positions that
    are compared, all unless given, and `rank_pos` those of the table of shifts, with the `top` and `watch`ed tokens.
    Two models have parted where a token's vectors differ by more than `tolerance` of the first one's length: rounding
    in float32 gives about 1e-6, in bfloat16 4e-3. CKA is carried by the longest vectors, often those of the first
    token, which pos=slice(1, None) leaves out. Models of other depths or widths are compared as far as that means
    something, sites by name, and `left_out` says what is not.

    Forwards are of at most `batch_tokens` tokens (with hooks: one of all prompts, whose rows they then are), and hold
    at most about `memory` bytes of activations and sums beside the logits; what does not fit is read in another pass
    over the prompts. Of the first `shown` prompts the stream is kept token by token.

    >>> found = diff(lm, lm, "I like oat milk in my", hooks_after=skip_block(17), sites=["resid_post", "attn_out"])
    >>> str(found.first), round(float(found.tokens["kl"].iloc[-1]), 3)
    ('resid_post.17', 0.082)
    """
    _check(batch_tokens=batch_tokens, memory=memory, top=top, shown=shown)
    meaning = "a part of a vector's length, such as 1e-4,"
    tolerance = finite_number(tolerance, "tolerance", least=0.0, meaning=meaning, error=OutOfRange)
    sides = (
        Side(before, together(hooks_before, "hooks_before"), while_before or nullcontext),
        Side(after, together(hooks_after, "hooks_after"), while_after or nullcontext),
    )
    stated = [*sides[0].hooks, *sides[1].hooks, while_before, while_after]
    if before.root is after.root and not any(each is not None for each in stated):
        raise BadHook(
            "both are one model: an edit of its weights is in both. Give a copy, hk.LM(copy.deepcopy(model), "
            "tokenizer), hooks_after=, or a block around the forwards of one, while_before=model.disable_adapter"
        )
    rows = rows_of(before, after, prompts)
    reader = reader_of(before, after)
    together_ = matched(before, after, sites)
    watched = tuple(reader.token(token) for token in read_tokens(watch, "watch"))
    edited = dict.fromkeys(
        i for side in sides for h in side.hooks if isinstance(h, LogitEdit) for i in h.named(side.lm)
    )
    asked = Asked(
        Where(as_pos(pos)), Where(as_pos(rank_pos)), top, watched, tuple(edited),
        _cka_at(cka, together_, before, chosen=sites is not None), float(tolerance), shown, batch_tokens, memory,
    )  # fmt: skip
    reading = Reading(reader, *sides, rows, together_, asked)
    reading.read()
    found = reading.tables() | {"left_out": pd.DataFrame(together_.left_out, columns=["what", "why"])}
    return Difference(**found, names=names or _names(sides), tolerance=asked.tolerance, about=_about(sides, reading))


def _check(**given: int) -> None:
    for name, value in given.items():
        least = 0 if name == "shown" else 1
        whole_number(value, name, least=least)


def _cka_at(cka: SitesLike | bool, there: Matched, lm: LM, *, chosen: bool) -> frozenset[AnySite]:
    """The sites whose CKA is taken; `BadHook` where one is not compared."""
    if isinstance(cka, bool):
        return frozenset(s for s in there.sites if cka and (chosen or (isinstance(s, Site) and s.name in STREAM)))
    found = lm.expand(cka)
    missing = [site for site in found if site not in there.kinds]
    if missing:
        raise BadHook(f"cka= names {missing[0]}, which is not compared: name it in sites= as well")
    return frozenset(found)


def _names(sides: tuple[Side, Side]) -> tuple[str, str]:
    """What the two are called: the models' names, and what tells them apart where these are the same."""
    about = [about_model(side.lm) for side in sides]
    found = [str(each["model"]) for each in about]
    if found[0] != found[1]:
        return found[0], found[1]
    dtypes = [" and ".join(each["dtype"]) for each in about]
    if dtypes[0] != dtypes[1]:
        return f"{found[0]} in {dtypes[0]}", f"{found[1]} in {dtypes[1]}"
    return f"{found[0]} before", f"{found[1]} after"


def _about(sides: tuple[Side, Side], reading: Reading) -> dict[str, Any]:
    """How it was made, for JSON."""
    about: dict[str, Any] = {}
    for name, side in zip(("before", "after"), sides, strict=True):
        hooks = [json.loads(hook.to_json(tensors="digest")) for hook in side.hooks]
        within = "" if side.around is nullcontext else getattr(side.around, "__qualname__", type(side.around).__name__)
        model = {word: value for word, value in about_model(side.lm).items() if word != "versions"}
        about[name] = {**model, "hooks": hooks, "within": within}
    asked, rows = reading.asked, reading.rows
    settings = {"pos": repr(asked.where.pos), "rank_pos": repr(asked.ranked.pos), "top": asked.top}
    settings |= {"watch": list(asked.watched), "tolerance": asked.tolerance, "shown": asked.shown}
    settings |= {"batch_tokens": asked.batch_tokens, "cka": sorted(map(str, asked.cka))}
    prompts = {"prompts": [reading.reader.text(row) for row in rows], "tokens": [list(row) for row in rows]}
    return {**about, "versions": versions(), "git_commit": git_commit(), **settings, **prompts}
