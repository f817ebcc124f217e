"""Hooks as short texts, VERB:WHAT@WHERE: `parse_hook` reads one, `format_hook` writes one.

`load_hooks` reads the hooks of a file. `text_grammar` has the grammar.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..arguments import check_arguments, shorten
from ..errors import BadFile, BadHook, HookkitError, NotOneToken, did_you_mean
from ..files.untrusted import MAX_MESSAGE, read_hook_list, read_text
from ..models.lm import LM
from ..models.sites import parse_site
from ..models.words import Word
from .ablation import Ablate, Patch, ablate, patch
from .base import Hook, as_tuple
from .capture import Capture, capture
from .edits import Knockout, Scale, SkipBlock, knockout, project_out, scale, skip_block, steer
from .grammar import KINDS, Grammar, grammar
from .logit_shifts import Boost, SetRank, ban, boost, cap, restrict, set_rank, swap
from .logits import LogitEdit, force
from .sources import UNEDITED, OtherPrompts, SourceEdit, away_from, toward
from .text_grammar import Spelling, parse_amount, parse_parts, parse_sites, parse_token, split
from .values import FromPrompt, Reference
from .vector import Vector, load_vector

LAYER = re.compile(r"\d{1,9}")
STREAM_SITE = re.compile(r"embed|resid_(?:pre|mid|post)\.\d{1,9}")  # a source that is a layer
LAYER_AND_HEAD = re.compile(r"\d{1,9}(?:\.\d{1,9})?")


@check_arguments
def parse_hook(text: str, *, lm: LM | None = None) -> Hook:
    """Returns the hook of a short text VERB:WHAT@WHERE, or of the JSON of `Hook.to_json`.

    Sites, tokens, positions and settings mean what the function of that verb means by them.
    `lm` is needed where a text is read with the model: for a steering vector's file, which is
    checked against it, and for several tokens in a row in force and ban. `format_hook` is the
    inverse.

    >>> print(parse_hook("ablate:z.9.3"), parse_hook("boost: tea=2.5"), sep="; ")
    ablate(z.9.3); boost(' tea', by=2.5)
    >>> print(parse_hook("force: coffee@0"))
    force(' coffee', step=0)
    >>> print(parse_hook("patch:resid_post.6:She takes green tea with@-1"))
    patch(resid_post.6, 'She takes green tea with', pos=-1)
    """
    if text.lstrip().startswith("{"):
        return Hook.from_json(text)
    spelling = parse_parts(text)
    if spelling.verb == "edit":
        raise BadHook(
            f"{text!r}: an edit needs a function, which no text holds: make it in Python, "
            "hk.edit(site, fn)"
        )
    if spelling.verb not in PARSERS:
        raise BadHook(
            f"{text!r}: there is no hook {spelling.verb!r}{did_you_mean(spelling.verb, PARSERS)} "
            f"There are: {', '.join(PARSERS)}."
        )
    return PARSERS[spelling.verb](spelling, lm)


@check_arguments
def load_hooks(path: str | os.PathLike[str], *, lm: LM | None = None) -> list[Hook]:
    """Returns the hooks of a YAML or JSON file.

    The file is a list of short texts, and of mappings as `Hook.to_json` writes them.

    >>> from pathlib import Path
    >>> _ = Path("hooks.yaml").write_text('- "ablate:z.9.3"\\n- "force: coffee@0"\\n')
    >>> [str(hook) for hook in load_hooks("hooks.yaml")]
    ['ablate(z.9.3)', "force(' coffee', step=0)"]
    """
    return [_hook_of_item(item, lm, os.fspath(path)) for item in read_hook_list(path)]


def check_hook(text: Any) -> None:
    """Raises for a hook's text that is wrong with every model. JSON is checked later."""
    if not isinstance(text, str) or text.lstrip().startswith("{"):
        return
    spelling = parse_parts(text)
    if spelling.verb not in ("steer", "project_out"):
        parse_hook(text)
        return
    _, path, _ = _sites_and_file(spelling)
    if not os.path.isfile(path):
        raise BadFile(
            f"{text!r}: {path!r} is no file of a vector that can be read: there is no such file"
        )


def _hook_of_item(item: Any, lm: LM | None, path: str) -> Hook:
    if isinstance(item, str):
        return parse_hook(item, lm=lm)
    if isinstance(item, Mapping) and "hook" in item:
        return Hook.from_json(json.dumps(item))
    text = shorten(str(item), MAX_MESSAGE)
    # YAML reads `force: coffee` as a mapping, and drops the space
    if isinstance(item, Mapping) and len(item) == 1:
        raise BadHook(
            f'{path!r} has {text}, a short text without quotes: write - "force: coffee@0"'
        )
    raise BadHook(
        f"{path!r} has {text}, which is no hook: write short texts in quotes, or what "
        "Hook.to_json() writes"
    )


def _parse_at_sites(function: Callable[..., Hook], spelling: Spelling, lm: LM | None) -> Hook:
    sites, after = parse_sites(spelling)
    if after:
        raise BadHook(
            f"{spelling.text!r} has {after!r} after its sites, where only @ and settings may "
            "stand: @pos=-1"
        )
    return function(sites, **spelling.settings)


def _parse_scale(spelling: Spelling, lm: LM | None) -> Hook:
    what, factor = parse_amount(spelling.what, "*", spelling)
    sites, _ = parse_sites(replace(spelling, what=what))
    return scale(sites, factor, **spelling.settings)


def _parse_skip_block(spelling: Spelling, lm: LM | None) -> Hook:
    layers = [layer for layer, _ in _layers_and_heads(spelling)]
    return skip_block(layers, **spelling.settings)


def _parse_knockout(spelling: Spelling, lm: LM | None) -> Hook:
    pairs = _layers_and_heads(spelling)
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    heads: Any = list(dict.fromkeys(head for _, head in pairs))
    if list(itertools.product(layers, heads)) != pairs:
        raise BadHook(
            f"{spelling.text!r} names heads that are no grid of layers and heads: give a hook for "
            "each layer"
        )
    if heads == [None]:
        heads = None
    return knockout(layers, heads, **{"key": None, **spelling.settings})


def _layers_and_heads(spelling: Spelling) -> list[tuple[int, int | None]]:
    """Returns layers, such as 3, or for knockout layers and heads, such as 9.3."""
    pattern, example = LAYER, "skip_block:3"
    if spelling.verb == "knockout":
        pattern, example = LAYER_AND_HEAD, "knockout:9.3@query=-1,key=0"
    pairs: list[tuple[int, int | None]] = []
    for item in spelling.what.split(","):
        if not pattern.fullmatch(item.strip()):
            raise BadHook(
                f"{spelling.text!r} has {item!r} where a block's number is meant: write {example}"
            )
        layer, _, head = item.partition(".")
        pairs.append((int(layer), int(head) if head else None))
    return pairs


def _parse_steer(spelling: Spelling, lm: LM | None) -> Hook:
    sites, path, factor = _sites_and_file(spelling)
    settings = spelling.settings
    if factor is not None:
        if "dose" in settings or "scale" in settings:
            raise BadHook(
                f"{spelling.text!r} says twice how much: *{factor:g}, and a dose or a scale"
            )
        settings = {**settings, "scale": factor}
    vector = _load_vector(path, lm, spelling)
    if sites is None or sites == [str(vector.site)]:
        return vector.steer(**settings)
    if "dose" in settings:
        raise BadHook(
            f"{spelling.text!r}: a dose is of the stream's length at {vector.site}: leave "
            f"{sites[0]} out"
        )
    return steer(sites, vector.tensor, **settings)


def _parse_project_out(spelling: Spelling, lm: LM | None) -> Hook:
    sites, path, factor = _sites_and_file(spelling)
    if factor is not None:
        raise BadHook(f"{spelling.text!r}: a direction has no size: leave *{factor:g} out")
    vector = _load_vector(path, lm, spelling)
    return project_out(sites or [str(vector.site)], vector.tensor, **spelling.settings)


def _sites_and_file(spelling: Spelling) -> tuple[list[str] | None, str, float | None]:
    """Returns the sites (None for the vector's own), the file, and the number after the last *."""
    what, factor = spelling.what, None
    if "*" in what:
        what, factor = parse_amount(what, "*", spelling)
    if os.path.isfile(what.strip()):  # False for names that are too long for a file
        return None, what.strip(), factor
    sites, after = parse_sites(replace(spelling, what=what))
    if not after.startswith(":"):
        raise BadHook(
            f"{spelling.text!r}: there is no file {what.strip()!r}: write {spelling.verb}:FILE, or "
            f"{spelling.verb}:SITE:FILE, with a file that Vector.save wrote"
        )
    return sites, after[1:].strip(), factor


def _load_vector(path: str, lm: LM | None, spelling: Spelling) -> Vector:
    if lm is None:
        raise BadHook(
            f"{spelling.text!r} reads a vector that is checked against a model: "
            "hk.parse_hook(text, lm=lm)"
        )
    try:
        return load_vector(lm, path)
    except BadFile as error:
        raise BadFile(
            f"{spelling.text!r}: {path!r} is no file of a vector that can be read: {error}"
        ) from error


def _parse_patch(spelling: Spelling, lm: LM | None) -> Hook:
    sites, prompt = parse_sites(spelling)
    prompt = prompt.removeprefix(":")
    if not prompt.strip():
        raise BadHook(
            f"{spelling.text!r} has no prompt to patch from: write "
            "patch:resid_post.6:She takes tea with@-1"
        )
    return patch(sites, prompt, **spelling.settings)


def _as_exact_text(token: Any, lm: LM | None) -> Any:
    """Returns a `Word` for a text of several tokens, if there is a model to tokenize it."""
    if isinstance(token, str) and lm is not None and lm.tokenizer is not None:
        try:
            lm.token(token)
        except NotOneToken:
            return Word(token, exact=True)
    return token


def _parse_tokens(function: Callable[..., Hook], spelling: Spelling, lm: LM | None) -> Hook:
    texts = [spelling.what] if spelling.verb == "force" else split(spelling.what)
    tokens = [parse_token(text, spelling) for text in texts]
    if spelling.verb in ("force", "ban"):
        tokens = [_as_exact_text(token, lm) for token in tokens]
    if spelling.verb == "swap" and len(tokens) != 2:
        raise BadHook(
            f"{spelling.text!r} names {len(tokens)} tokens, and two change places: write "
            "swap: coffee, tea"
        )
    return function(*tokens, **spelling.settings)


def _parse_boost(spelling: Spelling, lm: LM | None) -> Hook:
    if "by" in spelling.settings:
        return _parse_tokens(boost, spelling, lm)
    amounts: dict[Any, float] = {}
    for item in split(spelling.what):
        text, amount = parse_amount(item, "=", spelling)
        token = parse_token(text, spelling)
        if token in amounts:
            raise BadHook(f"{spelling.text!r} boosts {token!r} twice: give each token one amount")
        amounts[token] = amount
    if len(amounts) == 1:
        token, amount = next(iter(amounts.items()))
        return boost(token, by=amount, **spelling.settings)
    return boost(by=amounts, **spelling.settings)


def _parse_set_rank(spelling: Spelling, lm: LM | None) -> Hook:
    text, rank = parse_amount(spelling.what, "=", spelling)
    token: Any = parse_token(text, spelling)
    rank_value: Any = int(rank) if rank.is_integer() else rank
    return set_rank(token, rank_value, **spelling.settings)


def _parse_source(function: Callable[..., Hook], spelling: Spelling, lm: LM | None) -> Hook:
    source: Any = spelling.what
    if not source.strip():
        raise BadHook(
            f"{spelling.text!r} has no source: write {spelling.verb}:She drinks tea. I like@by=0.5"
        )
    if source == repr(UNEDITED):
        source = UNEDITED
    elif STREAM_SITE.fullmatch(source):
        source = parse_site(source)
    return function(source, **spelling.settings)


def _parse_grammar(spelling: Spelling, lm: LM | None) -> Hook:
    kind, colon, text = spelling.what.strip().partition(":")
    if kind not in KINDS or not colon:
        raise BadHook(
            f"{spelling.text!r} says no kind of grammar: write grammar:regex:(yes|no), "
            "grammar:json:SCHEMA or grammar:ebnf:GRAMMAR; the last two may be files"
        )
    if kind != "regex" and os.path.isfile(text.strip()):
        text = read_text(text.strip())
    settings: dict[str, Any] = {kind: text, **spelling.settings}
    return grammar(**settings)


PARSERS: dict[str, Callable[[Spelling, LM | None], Hook]] = {
    "ablate": partial(_parse_at_sites, ablate),
    "patch": _parse_patch,
    "steer": _parse_steer,
    "project_out": _parse_project_out,
    "scale": _parse_scale,
    "skip_block": _parse_skip_block,
    "knockout": _parse_knockout,
    "capture": partial(_parse_at_sites, capture),
    "force": partial(_parse_tokens, force),
    "ban": partial(_parse_tokens, ban),
    "restrict": partial(_parse_tokens, restrict),
    "boost": _parse_boost,
    "cap": partial(_parse_tokens, cap),
    "swap": partial(_parse_tokens, swap),
    "set_rank": _parse_set_rank,
    "toward": partial(_parse_source, toward),
    "away_from": partial(_parse_source, away_from),
    "grammar": _parse_grammar,
}

# a token that needs no quotes
PLAIN_TOKEN = re.compile(r"[^\s,=@'\"():](?:[^,=@'\"():]*[^\s,=@'\"():])?")


@check_arguments
def format_hook(hook: Hook) -> str:
    """Returns the shortest text from which `parse_hook` makes an equal hook.

    That is JSON for hooks without a short form: those with tensors (steer, patch, project_out). A
    user's function cannot be read back.

    >>> format_hook(force(" coffee", step=0))
    'force: coffee@step=0'
    >>> format_hook(ablate(lm.sites("z", layers=[9], heads=[0, 3]), pos=-1))
    'ablate:z.9.0,z.9.3@pos=-1'
    """
    text = _short_text(hook)
    try:
        if text is not None and parse_hook(text) == hook:
            return text
    except HookkitError:
        pass  # the grammar has no form for one of its values
    return hook.to_json()


def _short_text(hook: Hook) -> str | None:
    """Returns VERB:WHAT@WHERE; None for a hook without a short form."""
    what = ",".join(map(str, hook.sites))
    settings = hook.settings()
    match hook:
        case SourceEdit():
            what = _format_source(hook)
        case LogitEdit():
            if what != "logits":
                return None
            what = _format_tokens(hook, settings)
        case SkipBlock() | Knockout():
            what = ",".join(str(site).partition(".")[2] for site in hook.sites)
        case Scale():
            what += f"*{hook.factor!r}"
        case Patch(to=FromPrompt(prompt=str(prompt))):
            what += f":{prompt}"
        case Ablate(to=Reference(sources=()) as reference):
            settings = _reference_settings(hook, reference)
        case Ablate(to="zero") | Capture():
            pass
        case _:
            return None
    text = f"{hook.verb}:{what}"
    return f"{text}@{_format_settings(settings)}" if settings else text


def _format_source(hook: SourceEdit) -> str:
    """Returns a source in the grammar; for one without a form, the text of another hook."""
    match hook.source:
        case OtherPrompts(prompts=(str(prompt),)):
            return prompt
    return repr(hook.source)


def _reference_settings(hook: Ablate, reference: Reference) -> dict[str, Any]:
    """Returns the keywords of an ablation by reference prompts."""
    settings: dict[str, Any] = {"to": reference.how, "over": reference.prompts}
    settings["per"] = reference.per
    if reference.how == "resample":
        settings["seed"] = reference.seed
    if hook.when is not None:
        settings["when"] = hook.when
    return settings | hook.where_settings()


def _format_tokens(hook: LogitEdit, settings: dict[str, Any]) -> str:
    if isinstance(hook, Grammar):
        return f"{hook.kind}:{hook.text}"
    words = []
    for name in hook.names:
        words += map(format_token, as_tuple(getattr(hook, name)))
    amounts = as_tuple(settings.get("by"))
    if isinstance(hook, Boost) and len(amounts) == len(words):
        del settings["by"]
        words = [f"{word}={amount!r}" for word, amount in zip(words, amounts, strict=True)]
    if isinstance(hook, SetRank):
        words = [f"{words[0]}={hook.rank}"]
    return ",".join(words)


def _format_settings(settings: dict[str, Any]) -> str:
    items = []
    for name, value in settings.items():
        shown_value = list(value) if isinstance(value, tuple) else value
        items.append(f"{name}={shown_value!r}")
    return ",".join(items)


def format_token(token: Any) -> str:
    """Returns a token in the grammar: bare, in quotes, by its id, or as a word."""
    if isinstance(token, Word):
        return repr(token)
    if isinstance(token, int):
        return f"id({token})"
    needs_no_quotes = PLAIN_TOKEN.fullmatch(token.removeprefix(" "))
    return token if needs_no_quotes else repr(token)
