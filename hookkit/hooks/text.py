"""Hooks as short texts, VERB:WHAT@WHERE: `parse_hook` reads one, `format_hook` writes one.

`load_hooks` reads the hooks of a file. `text_grammar` has the grammar.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..arguments import checks_arguments
from ..errors import BadFile, BadHook, HookkitError, NotOneToken, did_you_mean
from ..files.untrusted import SHORT, hooks_listed
from ..models.lm import LM
from ..models.sites import Site
from .ablation import Ablate, FromPrompt, Patch, Reference, ablate, patch
from .base import EVERY_STEP, Hook
from .capture import Capture, capture
from .conditions import Phrase, phrase
from .edits import Scale, SkipBlock, project_out, scale, skip_block, steer
from .knockout import Knockout, knockout
from .logit_shifts import Boost, SetRank, boost, cap, set_rank, swap
from .logits import LogitEdit, ban, force, restrict
from .text_grammar import Spelling, amount_of, parts_of, sites_of, split, token_of, tokens_of
from .vector import Vector, load_vector

MAX_DIGITS = 9  # of the number of a layer or a head


@checks_arguments
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
    spelled = parts_of(text)
    if spelled.verb == "edit":
        raise BadHook(
            f"{text!r}: an edit needs a function, which no text holds: make it in Python, "
            "hk.edit(site, fn)"
        )
    if spelled.verb not in PARSERS:
        raise BadHook(
            f"{text!r}: there is no hook {spelled.verb!r}{did_you_mean(spelled.verb, PARSERS)} "
            f"There are: {', '.join(PARSERS)}."
        )
    return PARSERS[spelled.verb](spelled, lm)


@checks_arguments
def load_hooks(path: str | os.PathLike[str], *, lm: LM | None = None) -> list[Hook]:
    """Returns the hooks of a YAML or JSON file.

    The file is a list of short texts, and of mappings as `Hook.to_json` writes them.

    >>> from pathlib import Path
    >>> _ = Path("hooks.yaml").write_text('- "ablate:z.9.3"\\n- "force: coffee@0"\\n')
    >>> [str(hook) for hook in load_hooks("hooks.yaml")]
    ['ablate(z.9.3)', "force(' coffee', step=0)"]
    """
    return [_hook_of_item(item, lm, os.fspath(path)) for item in hooks_listed(path)]


def check_hook(text: Any) -> None:
    """Raises for a hook's text that is wrong with every model. JSON is checked later."""
    if not isinstance(text, str) or text.lstrip().startswith("{"):
        return
    spelled = parts_of(text)
    if spelled.verb not in ("steer", "project_out"):
        parse_hook(text)
        return
    _, path, _ = _sites_and_file(spelled)
    if not os.path.isfile(path):
        raise BadFile(
            f"{text!r}: {path!r} is no file of a vector that can be read: there is no such file"
        )


def _hook_of_item(item: Any, lm: LM | None, path: str) -> Hook:
    if isinstance(item, str):
        return parse_hook(item, lm=lm)
    if isinstance(item, Mapping) and "hook" in item:
        return Hook.from_json(json.dumps(item))
    text = str(item)
    if len(text) > SHORT:
        text = f"{text[:SHORT]}…"
    # YAML reads `force: coffee` as a mapping, and drops the space
    if isinstance(item, Mapping) and len(item) == 1:
        raise BadHook(
            f'{path!r} has {text}, a short text without quotes: write - "force: coffee@0"'
        )
    raise BadHook(
        f"{path!r} has {text}, which is no hook: write short texts in quotes, or what "
        "Hook.to_json() writes"
    )


Parser = Callable[[Spelling, LM | None], Hook]


def _settings(spelled: Spelling, place_name: str = "pos") -> dict[str, Any]:
    """Returns the keywords of the hook's function; the place is the one with this name."""
    place = {} if spelled.place is None else {place_name: spelled.place}
    return place | spelled.settings


def _step_settings(spelled: Spelling) -> dict[str, Any]:
    return _settings(spelled, "step")


def _parse_sites(function: Callable[..., Hook]) -> Parser:
    def parse(spelled: Spelling, lm: LM | None) -> Hook:
        sites, after = sites_of(spelled)
        if after:
            raise BadHook(
                f"{spelled.text!r} has {after!r} after its sites, where only @ and settings may "
                "stand: @pos=-1"
            )
        return function(sites, **_settings(spelled))

    return parse


def _parse_scale(spelled: Spelling, lm: LM | None) -> Hook:
    what, factor = amount_of(spelled.what, "*", spelled)
    sites, _ = sites_of(Spelling(spelled.text, spelled.verb, what))
    return scale(sites, factor, **_settings(spelled))


def _parse_skip_block(spelled: Spelling, lm: LM | None) -> Hook:
    layers = [layer for layer, _ in _layers_and_heads(spelled)]
    return skip_block(layers, **_settings(spelled))


def _parse_knockout(spelled: Spelling, lm: LM | None) -> Hook:
    pairs = _layers_and_heads(spelled)
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    heads = list(dict.fromkeys(head for _, head in pairs))
    grid = [(layer, head) for layer in layers for head in heads]
    if grid != pairs:
        raise BadHook(
            f"{spelled.text!r} names heads that are no grid of layers and heads: give a hook for "
            "each layer"
        )
    settings = {"key": None, **_settings(spelled, "query")}
    return knockout(layers, None if heads == [None] else heads, **settings)


def _layers_and_heads(spelled: Spelling) -> list[tuple[int, int | None]]:
    """Returns layers, such as 3, or for knockout layers and heads, such as 9.3."""
    takes_heads = spelled.verb == "knockout"
    pairs: list[tuple[int, int | None]] = []
    for item in spelled.what.split(","):
        layer, dot, head = item.strip().partition(".")
        is_valid = _is_index(layer) and (not dot or (takes_heads and _is_index(head)))
        if not is_valid:
            example = "knockout:9.3@query=-1,key=0" if takes_heads else "skip_block:3"
            raise BadHook(
                f"{spelled.text!r} has {item!r} where a block's number is meant: write {example}"
            )
        pairs.append((int(layer), int(head) if dot else None))
    return pairs


def _is_index(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def _parse_steer(spelled: Spelling, lm: LM | None) -> Hook:
    sites, path, factor = _sites_and_file(spelled)
    settings = _settings(spelled)
    if factor is not None:
        if "dose" in settings or "scale" in settings:
            raise BadHook(
                f"{spelled.text!r} says twice how much: *{factor:g}, and a dose or a scale"
            )
        settings["scale"] = factor
    vector = _load_vector(path, lm, spelled)
    if sites is None or sites == [str(vector.site)]:
        return vector.steer(**settings)
    if "dose" in settings:
        raise BadHook(
            f"{spelled.text!r}: a dose is of the stream's length at {vector.site}: leave "
            f"{sites[0]} out"
        )
    return steer(sites, vector.tensor, **settings)


def _parse_project_out(spelled: Spelling, lm: LM | None) -> Hook:
    sites, path, factor = _sites_and_file(spelled)
    if factor is not None:
        raise BadHook(f"{spelled.text!r}: a direction has no size: leave *{factor:g} out")
    vector = _load_vector(path, lm, spelled)
    return project_out(sites or [str(vector.site)], vector.tensor, **_settings(spelled))


def _sites_and_file(spelled: Spelling) -> tuple[list[str] | None, str, float | None]:
    """Returns the sites (None for the vector's own), the file, and the number after the last *."""
    what, factor = spelled.what, None
    if "*" in what:
        what, factor = amount_of(what, "*", spelled)
    if os.path.isfile(what.strip()):  # False for names that are too long for a file
        return None, what.strip(), factor
    sites, after = sites_of(Spelling(spelled.text, spelled.verb, what))
    if not after.startswith(":"):
        raise BadHook(
            f"{spelled.text!r}: there is no file {what.strip()!r}: write {spelled.verb}:FILE, or "
            f"{spelled.verb}:SITE:FILE, with a file that Vector.save wrote"
        )
    return sites, after[1:].strip(), factor


def _load_vector(path: str, lm: LM | None, spelled: Spelling) -> Vector:
    if lm is None:
        raise BadHook(
            f"{spelled.text!r} reads a vector that is checked against a model: "
            "hk.hook(text, lm=lm)"
        )
    try:
        return load_vector(lm, path)
    except BadFile as error:
        raise BadFile(
            f"{spelled.text!r}: {path!r} is no file of a vector that can be read: {error}"
        ) from error


def _parse_patch(spelled: Spelling, lm: LM | None) -> Hook:
    sites, prompt = sites_of(spelled)
    prompt = prompt.removeprefix(":")
    if not prompt.strip():
        raise BadHook(
            f"{spelled.text!r} has no prompt to patch from: write "
            "patch:resid_post.6:She takes tea with@-1"
        )
    return patch(sites, prompt, **_settings(spelled))


def _as_phrase(token: Any, lm: LM | None) -> Any:
    """Returns a phrase for a text of several tokens, if there is a model to tokenize it."""
    if isinstance(token, str) and lm is not None and lm.tokenizer is not None:
        try:
            lm.token(token)
        except NotOneToken:
            return phrase(token)
    return token


def _parse_force(spelled: Spelling, lm: LM | None) -> Hook:
    token = _as_phrase(token_of(spelled.what, spelled), lm)
    return force(token, **_step_settings(spelled))


def _parse_ban(spelled: Spelling, lm: LM | None) -> Hook:
    tokens = [_as_phrase(token, lm) for token in tokens_of(spelled)]
    return ban(tokens, **_step_settings(spelled))


def _parse_tokens(function: Callable[..., Hook]) -> Parser:
    def parse(spelled: Spelling, lm: LM | None) -> Hook:
        return function(*tokens_of(spelled), **_step_settings(spelled))

    return parse


def _parse_boost(spelled: Spelling, lm: LM | None) -> Hook:
    settings = _step_settings(spelled)
    if "by" in settings:
        return boost(*tokens_of(spelled), **settings)  # pyright: ignore
    tokens: list[Any] = []
    amounts = []
    for item in split(spelled.what):
        text, amount = amount_of(item, "=", spelled)
        tokens.append(token_of(text, spelled))
        amounts.append(amount)
    if len(tokens) == 1:
        return boost(tokens[0], by=amounts[0], **settings)
    return boost(by=dict(zip(tokens, amounts, strict=True)), **settings)


def _parse_swap(spelled: Spelling, lm: LM | None) -> Hook:
    tokens: list[Any] = list(tokens_of(spelled))
    if len(tokens) != 2:
        raise BadHook(
            f"{spelled.text!r} names {len(tokens)} tokens, and two change places: write "
            "swap: coffee, tea"
        )
    return swap(*tokens, **_step_settings(spelled))


def _parse_set_rank(spelled: Spelling, lm: LM | None) -> Hook:
    text, rank = amount_of(spelled.what, "=", spelled)
    token: Any = token_of(text, spelled)
    rank_value: Any = int(rank) if rank.is_integer() else rank
    return set_rank(token, rank_value, **_step_settings(spelled))


PARSERS: dict[str, Parser] = {
    "ablate": _parse_sites(ablate),
    "patch": _parse_patch,
    "steer": _parse_steer,
    "project_out": _parse_project_out,
    "scale": _parse_scale,
    "skip_block": _parse_skip_block,
    "knockout": _parse_knockout,
    "capture": _parse_sites(capture),
    "force": _parse_force,
    "ban": _parse_ban,
    "restrict": _parse_tokens(restrict),
    "boost": _parse_boost,
    "cap": _parse_tokens(cap),
    "swap": _parse_swap,
    "set_rank": _parse_set_rank,
}

# a token that needs no quotes
PLAIN_TOKEN = re.compile(r"[^\s,=@'\"():](?:[^,=@'\"():]*[^\s,=@'\"():])?")


@checks_arguments
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
    what = _format_what(hook)
    if what is None:
        return None
    settings = [f"{name}={_format_value(value)}" for name, value in _settings_of(hook).items()]
    return f"{hook.verb}:{what}" + (f"@{','.join(settings)}" if settings else "")


def _format_what(hook: Hook) -> str | None:
    """Returns the text after the verb; None for a hook without a short form."""
    if isinstance(hook, LogitEdit):
        is_at_logits = len(hook.sites) == 1 and str(hook.sites[0]) == "logits"
        return _format_tokens(hook) if is_at_logits else None
    if isinstance(hook, SkipBlock | Knockout):
        indices = [(site.layer, site.head) for site in hook.sites if isinstance(site, Site)]
        return ",".join(
            f"{layer}" if head is None else f"{layer}.{head}" for layer, head in indices
        )
    sites = ",".join(map(str, hook.sites))
    if isinstance(hook, Scale):
        return f"{sites}*{hook.factor!r}"
    if isinstance(hook, Ablate):
        return _format_ablation(hook, sites)
    return sites if isinstance(hook, Capture) else None


def _format_ablation(hook: Ablate, sites: str) -> str | None:
    if isinstance(hook.to, FromPrompt):
        is_patch_from_text = isinstance(hook, Patch) and isinstance(hook.to.prompt, str)
        return f"{sites}:{hook.to.prompt}" if is_patch_from_text else None
    has_prompts = isinstance(hook.to, Reference) and not hook.to.sources
    return sites if hook.to == "zero" or has_prompts else None


def _format_tokens(hook: LogitEdit) -> str:
    words = []
    for name in hook.names:
        words += [spelled_token(token) for token in _as_tuple(getattr(hook, name))]
    if isinstance(hook, Boost) and _has_amount_for_each(hook):
        amounts = _as_tuple(hook.by)
        words = [f"{word}={amount!r}" for word, amount in zip(words, amounts, strict=True)]
    if isinstance(hook, SetRank):
        words = [f"{words[0]}={hook.rank}"]
    return ",".join(words)


def _has_amount_for_each(hook: Boost) -> bool:
    return len(_as_tuple(hook.by)) == len(hook.tokens)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def spelled_token(token: Any) -> str:
    """Returns a token in the grammar: bare, in quotes, by its id, or as a phrase."""
    if isinstance(token, Phrase):
        return repr(token)
    if isinstance(token, int):
        return f"id({token})"
    return token if PLAIN_TOKEN.fullmatch(token.removeprefix(" ")) else repr(token)


def _settings_of(hook: Hook) -> dict[str, Any]:
    """Returns the keywords of the hook's function that differ from their defaults."""
    if isinstance(hook, Ablate) and isinstance(hook.to, Reference):
        reference = hook.to
        settings: dict[str, Any] = {"to": reference.how, "over": list(reference.prompts)}
        settings["per"] = reference.per
        if reference.how == "resample":
            settings["seed"] = reference.seed
        return settings | _where_settings(hook)
    in_what = ["sites", "where", *hook.bare]
    if isinstance(hook, Boost) and _has_amount_for_each(hook):
        in_what.append("by")
    settings = {}
    for field in fields(hook):
        value = getattr(hook, field.name)
        if field.name not in in_what and value != field.default:
            settings[field.name] = value
    return settings | _where_settings(hook)


def _where_settings(hook: Hook) -> dict[str, Any]:
    where = hook.where
    settings = {"pos": where.pos, "rows": where.rows, "step": where.step}
    if isinstance(hook, LogitEdit) and where.step == EVERY_STEP:
        del settings["step"]
    if isinstance(hook, Knockout):
        settings["query"] = settings.pop("pos")
    return {name: value for name, value in settings.items() if value is not None}


def _format_value(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


hook, spell = parse_hook, format_hook  # the names in `hk`
