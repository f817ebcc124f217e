"""hk.spell: a hook as a short text, where it has one."""

import re
from dataclasses import fields
from typing import Any

from ..arguments import checks_arguments
from ..errors import HookkitError
from ..hooks.base import EVERY_STEP, Hook
from ..hooks.cutting import Knockout
from ..hooks.edits import Scale, SkipBlock
from ..hooks.logits import LogitEdit
from ..hooks.looking import Capture
from ..hooks.moving import Boost, SetRank
from ..hooks.phrases import Phrase
from ..hooks.replacing import Ablate, Patch, Reference
from ..sites import Site
from .reading import hook as read

SHORT = re.compile(r"[^\s,=@'\"():](?:[^,=@'\"():]*[^\s,=@'\"():])?")  # a token that needs no quotes


@checks_arguments
def spell(hook: Hook) -> str:
    """A hook as the shortest text from which `hk.hook` makes it again, equal to it: JSON where it has no short form.

    Those with tensors (steer, patch, project_out) have none, and a user's function cannot be read back.

    >>> spell(force(" coffee", step=0)), spell(ablate(lm.sites("z", layers=[9], heads=[0, 3]), pos=-1))
    ('force: coffee@step=0', 'ablate:z.9.0,z.9.3@pos=-1')
    """
    text = _short(hook)
    try:
        if text is not None and read(text) == hook:
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
    prompts = isinstance(hook, Ablate) and isinstance(hook.to, Reference) and not hook.to.sources
    plain = isinstance(hook, Capture) or (isinstance(hook, Ablate) and (hook.to == "zero" or prompts))
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
    return token if SHORT.fullmatch(token.removeprefix(" ")) else repr(token)


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
    taken = ("sites", "where", *hook.bare, *(("by",) if isinstance(hook, Boost) and _spread(hook) else ()))
    given = {each.name: (getattr(hook, each.name), each.default) for each in fields(hook) if each.name not in taken}
    return {name: value for name, (value, default) in given.items() if value != default} | _where(hook)


def _where(hook: Hook) -> dict[str, Any]:
    found = {name: getattr(hook.where, name) for name in ("pos", "rows", "step")}
    if isinstance(hook, LogitEdit) and found["step"] == EVERY_STEP:
        del found["step"]
    if isinstance(hook, Knockout):
        found["query"] = found.pop("pos")
    return {name: value for name, value in found.items() if value is not None}


def _value(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
