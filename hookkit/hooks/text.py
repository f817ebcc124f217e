"""hk.hook: a hook from a short text, or from JSON; hk.load_hooks: those of a file.

hk.spell: a hook as a short text, where it has one.
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

DIGITS = 9  # of a layer's or a head's number


@checks_arguments
def parse_hook(text: str, *, lm: LM | None = None) -> Hook:
    """The hook that a short text VERB:WHAT@WHERE means, or that `Hook.to_json` wrote; `spell` is
    the way back.

    Sites, tokens, positions and settings are written as `hookkit.spelling` has them, and mean what
    the function of that verb means by them. `lm` is needed where a text has to be read with the
    model: a steering vector's file, which is checked against it, and several tokens in a row for
    force and ban.

    >>> print(parse_hook("ablate:z.9.3"), parse_hook("force: coffee@0"), parse_hook("boost: tea=2.5"), sep="; ")
    ablate(z.9.3); force(' coffee', step=0); boost(' tea', by=2.5)
    >>> print(parse_hook("patch:resid_post.6:She takes green tea with@-1"))
    patch(resid_post.6, 'She takes green tea with', pos=-1)
    """
    if text.lstrip().startswith("{"):
        return Hook.from_json(text)
    spelled = parts_of(text)
    if spelled.verb == "edit":
        raise BadHook(
            f"{text!r}: an edit needs a function, which no text holds: make it in Python, hk.edit(site, fn)"
        )
    if spelled.verb not in READ:
        raise BadHook(
            f"{text!r}: there is no hook {spelled.verb!r}{did_you_mean(spelled.verb, READ)} "
            f"There are: {', '.join(READ)}."
        )
    return READ[spelled.verb](spelled, lm)


@checks_arguments
def load_hooks(path: str | os.PathLike[str], *, lm: LM | None = None) -> list[Hook]:
    """The hooks of a YAML or JSON file: a list of short texts, and of mappings as `Hook.to_json`
    writes them.

    >>> from pathlib import Path
    >>> _ = Path("hooks.yaml").write_text('- "ablate:z.9.3"\\n- "force: coffee@0"\\n')
    >>> [str(each) for each in load_hooks("hooks.yaml")]
    ['ablate(z.9.3)', "force(' coffee', step=0)"]
    """
    listed = hooks_listed(path)
    return [_listed(each, lm, os.fspath(path)) for each in listed]


def check_hook(text: Any) -> None:
    """Raise what can be said of a hook's text, or of its JSON, without a model."""
    if not isinstance(text, str) or text.lstrip().startswith("{"):
        return  # which is read in a moment, when the model is there
    spelled = parts_of(text)
    if spelled.verb in ("steer", "project_out"):
        _, path, _ = _sites_and_file(spelled)
        if not os.path.isfile(path):
            raise BadFile(
                f"{text!r}: {path!r} is no file of a vector that can be read: there is no such file"
            )
    else:
        parse_hook(text)


def _listed(written: Any, lm: LM | None, path: str) -> Hook:
    if isinstance(written, str):
        return parse_hook(written, lm=lm)
    if isinstance(written, Mapping) and "hook" in written:
        return Hook.from_json(json.dumps(written))
    shortened = f"{str(written)[:SHORT]}{'…' if len(str(written)) > SHORT else ''}"
    if (
        isinstance(written, Mapping) and len(written) == 1
    ):  # YAML reads `force: coffee` so, and drops the space
        raise BadHook(
            f'{path!r} has {shortened}, a short text without quotes: write - "force: coffee@0"'
        )
    raise BadHook(
        f"{path!r} has {shortened}, which is no hook: write short texts in quotes, or what Hook.to_json() writes"
    )


def _inner(spelled: Spelling) -> dict[str, Any]:
    """The keywords of a hook on inner values: the place is its position."""
    return {**({} if spelled.place is None else {"pos": spelled.place}), **spelled.settings}


def _step(spelled: Spelling) -> dict[str, Any]:
    """The keywords of a hook on logits: the place is its step."""
    return {**({} if spelled.place is None else {"step": spelled.place}), **spelled.settings}


def _only_sites(made: Callable[..., Hook]) -> "Reader":
    def read(spelled: Spelling, lm: LM | None) -> Hook:
        sites, rest = sites_of(spelled)
        if rest:
            raise BadHook(
                f"{spelled.text!r} has {rest!r} behind its sites, where @ and settings may stand: @pos=-1"
            )
        return made(sites, **_inner(spelled))

    return read


def _scale(spelled: Spelling, lm: LM | None) -> Hook:
    what, factor = amount_of(spelled.what, "*", spelled)
    return scale(sites_of(Spelling(spelled.text, spelled.verb, what))[0], factor, **_inner(spelled))


def _skip_block(spelled: Spelling, lm: LM | None) -> Hook:
    return skip_block([number for number, _ in _numbers(spelled)], **_inner(spelled))


def _knockout(spelled: Spelling, lm: LM | None) -> Hook:
    found = _numbers(spelled)
    layers, heads = (list(dict.fromkeys(each)) for each in zip(*found, strict=True))
    if [(layer, head) for layer in layers for head in heads] != found:
        raise BadHook(
            f"{spelled.text!r} names heads that are no grid of layers and heads: give a hook for each layer"
        )
    settings = {**({} if spelled.place is None else {"query": spelled.place}), **spelled.settings}
    return knockout(layers, None if heads == [None] else heads, **{"key": None, **settings})


def _numbers(spelled: Spelling) -> list[tuple[int, int | None]]:
    """Layers, or layers and heads: 3, or 9.3."""
    found: list[tuple[int, int | None]] = []
    for each in spelled.what.split(","):
        layer, dot, head = each.strip().partition(".")
        digits = max(len(layer), len(head))
        if (
            digits > DIGITS
            or not layer.isdecimal()
            or (dot and (not head.isdecimal() or spelled.verb != "knockout"))
        ):
            example = (
                "knockout:9.3@query=-1,key=0" if spelled.verb == "knockout" else "skip_block:3"
            )
            raise BadHook(
                f"{spelled.text!r} has {each!r} where a block's number is meant: write {example}"
            )
        found.append((int(layer), int(head) if dot else None))
    return found


def _steer(spelled: Spelling, lm: LM | None) -> Hook:
    sites, path, scaled = _sites_and_file(spelled)
    settings = _inner(spelled)
    if scaled is not None and not {"dose", "scale"}.isdisjoint(settings):
        raise BadHook(f"{spelled.text!r} says twice how much: *{scaled:g}, and a dose or a scale")
    settings |= {} if scaled is None else {"scale": scaled}
    vector = _vector(path, lm, spelled)
    if sites is None or sites == [str(vector.site)]:
        return vector.steer(**settings)
    if "dose" in settings:
        raise BadHook(
            f"{spelled.text!r}: a dose is of the stream's length at {vector.site}: leave {sites[0]} out"
        )
    return steer(sites, vector.tensor, **settings)


def _project_out(spelled: Spelling, lm: LM | None) -> Hook:
    sites, path, scaled = _sites_and_file(spelled)
    if scaled is not None:
        raise BadHook(f"{spelled.text!r}: a direction has no size: leave *{scaled:g} out")
    vector = _vector(path, lm, spelled)
    return project_out(sites or [str(vector.site)], vector.tensor, **_inner(spelled))


def _sites_and_file(spelled: Spelling) -> tuple[list[str] | None, str, float | None]:
    """The sites (None where the vector's own is meant), the file, and the number behind its last *."""
    what, scaled = spelled.what, None
    head, star, number = what.rpartition("*")
    if star:
        what, scaled = amount_of(f"{head}*{number}", "*", spelled)
    if os.path.isfile(what.strip()):  # which knows of names that are too long for a file
        return None, what.strip(), scaled
    sites, rest = sites_of(Spelling(spelled.text, spelled.verb, what))
    if not rest.startswith(":"):
        raise BadHook(
            f"{spelled.text!r}: there is no file {what.strip()!r}: write {spelled.verb}:FILE, or "
            f"{spelled.verb}:SITE:FILE, with a file that Vector.save wrote"
        )
    return sites, rest[1:].strip(), scaled


def _vector(path: str, lm: LM | None, spelled: Spelling) -> Vector:
    if lm is None:
        raise BadHook(
            f"{spelled.text!r} reads a vector that is checked against a model: hk.hook(text, lm=lm)"
        )
    try:
        return load_vector(lm, path)
    except BadFile as error:
        raise BadFile(
            f"{spelled.text!r}: {path!r} is no file of a vector that can be read: {error}"
        ) from error


def _patch(spelled: Spelling, lm: LM | None) -> Hook:
    sites, prompt = sites_of(spelled)
    prompt = prompt.removeprefix(":")
    if not prompt.strip():
        raise BadHook(
            f"{spelled.text!r} has no prompt to patch from: write patch:resid_post.6:She takes tea with@-1"
        )
    return patch(sites, prompt, **_inner(spelled))


def _token(token: Any, lm: LM | None) -> Any:
    """A text of several tokens is a phrase, where there is a model to say so."""
    if isinstance(token, str) and lm is not None and lm.tokenizer is not None:
        try:
            lm.token(token)
        except NotOneToken:
            return phrase(token)
    return token


def _force(spelled: Spelling, lm: LM | None) -> Hook:
    return force(_token(token_of(spelled.what, spelled), lm), **_step(spelled))


def _ban(spelled: Spelling, lm: LM | None) -> Hook:
    return ban([_token(each, lm) for each in tokens_of(spelled)], **_step(spelled))


def _several(made: Callable[..., Hook]) -> "Reader":
    return lambda spelled, lm: made(*tokens_of(spelled), **_step(spelled))


def _boost(spelled: Spelling, lm: LM | None) -> Hook:
    if "by" in spelled.settings:
        return boost(*tokens_of(spelled), **_step(spelled))  # pyright: ignore
    found = [amount_of(each, "=", spelled) for each in split(spelled.what)]
    tokens: list[Any] = [token_of(token, spelled) for token, _ in found]
    if len(found) == 1:
        return boost(tokens[0], by=found[0][1], **_step(spelled))
    return boost(by=dict(zip(tokens, (by for _, by in found), strict=True)), **_step(spelled))


def _swap(spelled: Spelling, lm: LM | None) -> Hook:
    tokens: list[Any] = list(tokens_of(spelled))
    if len(tokens) != 2:
        raise BadHook(
            f"{spelled.text!r} names {len(tokens)} tokens, and two change places: write swap: coffee, tea"
        )
    return swap(*tokens, **_step(spelled))


def _set_rank(spelled: Spelling, lm: LM | None) -> Hook:
    what, rank = amount_of(spelled.what, "=", spelled)
    token: Any = token_of(what, spelled)
    return set_rank(token, int(rank) if rank.is_integer() else rank, **_step(spelled))  # pyright: ignore


Reader = Callable[[Spelling, LM | None], Hook]
READ: dict[str, Reader] = {
    "ablate": _only_sites(ablate), "patch": _patch, "steer": _steer, "project_out": _project_out, "scale": _scale,
    "skip_block": _skip_block, "knockout": _knockout, "capture": _only_sites(capture), "force": _force, "ban": _ban,
    "restrict": _several(restrict), "boost": _boost, "cap": _several(cap), "swap": _swap, "set_rank": _set_rank,
}  # fmt: skip


PLAIN_TOKEN = re.compile(
    r"[^\s,=@'\"():](?:[^,=@'\"():]*[^\s,=@'\"():])?"
)  # a token that needs no quotes


@checks_arguments
def format_hook(hook: Hook) -> str:
    """A hook as the shortest text from which `hk.hook` makes it again, equal to it: JSON where it
    has no short form.

    Those with tensors (steer, patch, project_out) have none, and a user's function cannot be read
    back.

    >>> format_hook(force(" coffee", step=0)), format_hook(ablate(lm.sites("z", layers=[9], heads=[0, 3]), pos=-1))
    ('force: coffee@step=0', 'ablate:z.9.0,z.9.3@pos=-1')
    """
    text = _short(hook)
    try:
        if text is not None and parse_hook(text) == hook:
            return text
    except HookkitError:
        pass  # a value that the grammar has no word for
    return hook.to_json()


def _short(hook: Hook) -> str | None:
    what = _what(hook)
    if what is None:
        return None
    settings = [f"{name}={_value(value)}" for name, value in _settings(hook).items()]
    return f"{hook.verb}:{what}" + (f"@{','.join(settings)}" if settings else "")


def _what(hook: Hook) -> str | None:
    """What stands behind the verb; None for a hook without a short form."""
    sites = [site for site in hook.sites if isinstance(site, Site)]
    if isinstance(hook, SkipBlock):
        return ",".join(str(site.layer) for site in sites)
    if isinstance(hook, Knockout):
        return ",".join(f"{s.layer}" if s.head is None else f"{s.layer}.{s.head}" for s in sites)
    if isinstance(hook, LogitEdit):
        return _tokens(hook) if str(hook.sites[0]) == "logits" and len(hook.sites) == 1 else None
    names = ",".join(map(str, hook.sites))
    if isinstance(hook, Scale):
        return f"{names}*{hook.factor!r}"
    if isinstance(hook, Patch) and isinstance(hook.to, FromPrompt):
        return f"{names}:{hook.to.prompt}" if isinstance(hook.to.prompt, str) else None
    prompts = isinstance(hook, Ablate) and isinstance(hook.to, Reference) and not hook.to.sources
    plain = isinstance(hook, Capture) or (
        isinstance(hook, Ablate) and (hook.to == "zero" or prompts)
    )
    return names if plain and not isinstance(hook, Patch) else None


def _tokens(hook: LogitEdit) -> str:
    tokens = [each for name in hook.names for each in _as_tuple(getattr(hook, name))]
    words = [spelled_token(each) for each in tokens]
    if isinstance(hook, Boost) and _spread(hook):
        words = [f"{word}={by!r}" for word, by in zip(words, _as_tuple(hook.by), strict=True)]
    if isinstance(hook, SetRank):
        words = [f"{words[0]}={hook.rank}"]
    return ",".join(words)


def _spread(hook: Boost) -> bool:
    """True where each token has its amount beside it."""
    return len(_as_tuple(hook.by)) == len(hook.tokens)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def spelled_token(token: Any) -> str:
    """A token as the grammar has it: bare, in quotes, by its id, or a phrase."""
    if isinstance(token, Phrase):
        return repr(token)
    if isinstance(token, int):
        return f"id({token})"
    return token if PLAIN_TOKEN.fullmatch(token.removeprefix(" ")) else repr(token)


def _settings(hook: Hook) -> dict[str, Any]:
    """The keywords of the hook's own function that are not as they are when left out."""
    if isinstance(hook, Ablate) and isinstance(hook.to, Reference):
        return {
            "to": hook.to.how,
            "over": list(hook.to.prompts),
            "per": hook.to.per,
            **({"seed": hook.to.seed} if hook.to.how == "resample" else {}),
            **_where(hook),
        }
    taken = (
        "sites",
        "where",
        *hook.bare,
        *(("by",) if isinstance(hook, Boost) and _spread(hook) else ()),
    )
    given = {
        each.name: (getattr(hook, each.name), each.default)
        for each in fields(hook)
        if each.name not in taken
    }
    return {name: value for name, (value, default) in given.items() if value != default} | _where(
        hook
    )


def _where(hook: Hook) -> dict[str, Any]:
    found = {name: getattr(hook.where, name) for name in ("pos", "rows", "step")}
    if isinstance(hook, LogitEdit) and found["step"] == EVERY_STEP:
        del found["step"]
    if isinstance(hook, Knockout):
        found["query"] = found.pop("pos")
    return {name: value for name, value in found.items() if value is not None}


def _value(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


hook, spell = parse_hook, format_hook  # the names in `hk`
