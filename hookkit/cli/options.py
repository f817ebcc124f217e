"""The options that commands share, each written once: which model, which prompts, which hooks, how it is generated.

The options of a command that say where it computes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .output import passing

if TYPE_CHECKING:
    from ..hooks.base import Hook
    from ..models.lm import LM
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runs.engines.ray import EngineLike


Top: TypeAlias = Annotated[int, typer.Option(min=1, help="How many tokens to show.")]
Watch: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN", help="A token, or id(28), to show wherever it stands."),
]
Pos: TypeAlias = Annotated[
    str, typer.Option(metavar="POS", help="Where: -1 the last token, 3, 1:4, all, \"at('store')\".")
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Of the random draws.")]
Layer: TypeAlias = Annotated[
    list[int] | None, typer.Option(help="A layer; repeatable. All if left out.")
]
Head: TypeAlias = Annotated[
    list[int] | None, typer.Option(help="A head; repeatable. All if left out.")
]
Position: TypeAlias = Annotated[
    list[int] | None, typer.Option(help="A position of the prompt; repeatable.")
]
Prompt: TypeAlias = Annotated[
    str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, mps; the best there is if left out."),
]


@dataclass(frozen=True)
class Which:
    """Which model."""

    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A Hugging Face id, a folder or a .gguf file."),
    ] = None
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="A branch, tag or commit of the model.")
    ] = None
    device: Device = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="In which the model computes: float32, bfloat16 …"),
    ] = None

    def load(self, *, quiet: bool = False, **more: Any) -> "LM":
        """The model that these words mean, the default one where they say nothing."""
        if not quiet:
            passing(f"loading {self.model or 'the default model'} …")
        from ..models.loading import load

        given = {"revision": self.revision, "device": self.device, "dtype": self.dtype, **more}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return load(**given) if self.model is None else load(self.model, **given)
        finally:
            passing("")


@dataclass(frozen=True)
class Texts:
    """Which prompts; several are a batch."""

    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help="The prompts; - reads them from standard input, one a line."
        ),
    ] = None
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of prompts, one a line.")
    ] = None

    def read(self) -> list[str]:
        """The prompts, in the order: arguments, file."""
        from ..errors import BadPrompt

        found: list[str] = []
        for each in self.prompt or []:
            found += _lines(standard_input()) if each == "-" else [readable(each)]
        if self.prompts is not None:
            found += _lines(text_of(self.prompts))
        if not found:
            raise BadPrompt(
                "there is no prompt: give a text, --prompts FILE, or - for standard input"
            )
        return found


def one_prompt(prompt: str) -> str:
    """The prompt, all of standard input where it is -."""
    return standard_input().removesuffix("\n") if prompt == "-" else readable(prompt)


def standard_input() -> str:
    """The text that comes on standard input, or `BadPrompt`."""
    from ..errors import BadPrompt
    from ..files.untrusted import decoded

    if sys.stdin is None or sys.stdin.closed:
        raise BadPrompt(
            "standard input is closed, and - reads a prompt from it: give a text, or --prompts FILE"
        )
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise BadPrompt(f"standard input cannot be read: {error.strerror or error}") from error
    return decoded(data, "standard input", error=BadPrompt).replace("\r\n", "\n")


def readable(text: str) -> str:
    """A text of the command line, or `BadPrompt` where its bytes are no UTF-8."""
    from ..errors import BadPrompt

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt(f"{text!r} is no text in UTF-8: {error.reason}") from error
    return text


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def text_of(path: Path) -> str:
    """What is in a file, or `BadFile`."""
    from ..errors import BadFile
    from ..files.untrusted import reason
    from ..files.untrusted import text_of as read

    try:
        return read(path).replace("\r\n", "\n")
    except BadFile as error:
        why = reason(error.__cause__ or error)
        raise BadFile(f"{str(path)!r} is no file of prompts that can be read: {why}") from error


SHORT = (
    "ablate",
    "scale",
    "skip_block",
    "steer",
    "patch",
    "force",
    "ban",
    "boost",
)  # in this order they act


@dataclass(frozen=True)
class Edits:
    """Which hooks: of a file, as short texts, and the most usual ones by their verb."""

    hook: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOOK",
            help="VERB:WHAT@WHERE, such as ablate:z.9.3, or a hook's JSON; repeatable.",
        ),
    ] = None
    hooks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML or JSON file with a list of such hooks."),
    ] = None
    ablate: Annotated[
        list[str] | None, typer.Option(metavar="SITE", help="SITE, such as z.9.3; repeatable.")
    ] = None
    scale: Annotated[
        list[str] | None, typer.Option(metavar="SITE*FACTOR", help="SITE*FACTOR; repeatable.")
    ] = None
    skip_block: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="LAYER; repeatable.")
    ] = None
    steer: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE*SCALE", help="FILE*SCALE, or SITE:FILE*SCALE; repeatable."),
    ] = None
    patch: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE:TEXT", help="SITE:TEXT, with what that text has there."),
    ] = None
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="TOKEN at every step, or TOKEN@STEP; a phrase from that step on."
        ),
    ] = None
    ban: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="A token, or a phrase, that is never to be said."),
    ] = None
    boost: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN=AMOUNT", help="TOKEN=AMOUNT in logits; repeatable."),
    ] = None

    def check(self, *, needed: str = "") -> None:
        """Raise what can be said of the hooks without a model. `needed` says what there is to do only with one."""
        from ..errors import BadHook
        from ..files.untrusted import hooks_listed

        texts = [] if self.hooks is None else hooks_listed(self.hooks)
        texts += self.hook or []
        texts += [f"{verb}:{words}" for verb in SHORT for words in getattr(self, verb) or []]
        if needed and not texts:
            raise BadHook(
                f"there is no hook, and {needed}: give --force ' coffee', --ablate z.9.3, --hook, --hooks …"
            )
        if texts:
            from ..hooks.text import check_hook

            for text in texts:
                check_hook(text)

    def read(self, lm: "LM", note: Callable[[str], None]) -> list["Hook"]:
        """The hooks, those of the file first."""
        from ..hooks.text import load_hooks, parse_hook

        found = [] if self.hooks is None else load_hooks(self.hooks, lm=lm)
        found += [parse_hook(text, lm=lm) for text in self.hook or []]
        found += [
            parse_hook(f"{verb}:{words}", lm=lm)
            for verb in SHORT
            for words in getattr(self, verb) or []
        ]
        for each in found:
            _note_phrases(lm, each, note)
        return found


def _note_phrases(lm: "LM", hook: "Hook", note: Callable[[str], None]) -> None:
    """A word on a phrase that would be one token with a space before it, which is what is mostly meant."""
    from ..errors import NotOneToken
    from ..hooks.conditions import Phrase

    for each in [*getattr(hook, "tokens", ()), getattr(hook, "token", None)]:
        if (
            not isinstance(each, Phrase)
            or not isinstance(each.words, str)
            or each.words.startswith(" ")
        ):
            continue
        spaced = f" {each.words}"
        try:
            lm.token(spaced)
        except NotOneToken:
            continue
        note(
            f"{each.words!r} is {len(each.ids(lm))} tokens here, and taken as a phrase; {spaced!r} is one token"
        )


@dataclass(frozen=True)
class Generation:
    """How it goes on from a prompt."""

    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to generate at most.")
    ] = 20
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw, instead of the most likely token each time.")
    ] = False
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None

    def arguments(self) -> dict[str, Any]:
        """What generate is given."""
        from ..errors import BadHook

        rules = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in rules.items() if value is not None}
        if given and not self.sample:
            raise BadHook("--temperature, --top-k and --top-p are rules of drawing: add --sample")
        _check_rules(given)
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample,
            "seed": self.seed,
            **given,
        }


def _check_rules(given: dict[str, Any]) -> None:
    """Raise `BadHook` for what no draw can follow; transformers would end in a traceback."""
    from ..errors import BadHook

    fine = {"temperature": lambda t: t > 0, "top_k": lambda k: k > 0, "top_p": lambda p: 0 < p <= 1}
    for name, value in given.items():
        if not fine[name](value):
            limit = "more than 0, at most 1" if name == "top_p" else "more than 0"
            raise BadHook(
                f"--{name.replace('_', '-')} {value} is no rule of drawing: give a number {limit}"
            )


def place(text: str) -> Any:
    """The positions that --pos means; all of them for "all"."""
    from ..hooks.text_grammar import place_of

    found = place_of(text, "--pos")
    return slice(None) if found is None else found


def word(text: str) -> "str | int":
    """The token that an option names: as it stands, in quotes, or by its id(28)."""
    from ..hooks.text_grammar import word_of

    found: Any = word_of(text)
    return found if isinstance(found, str | int) else text


def watched(lm: "LM", watch: list[str] | None) -> list[int]:
    """The ids of the watched tokens; raises before anything runs."""
    return [lm.token(word(each)) for each in watch or []]


@dataclass(frozen=True)
class Engine:
    """Where it is computed: in this process, or by Ray's actors."""

    engine: Annotated[str | None, typer.Option(help="ray; this process if left out.")] = None
    actors: Annotated[
        int | None, typer.Option(min=1, help="With ray: how many; as many as fit if left out.")
    ] = None
    cpus: Annotated[
        float | None, typer.Option(min=0, help="With ray: of each actor; 1 if left out.")
    ] = None
    gpus: Annotated[
        float | None, typer.Option(min=0, help="With ray: of each actor; 0 if left out.")
    ] = None
    address: Annotated[str | None, typer.Option(help="With ray: of a cluster to join.")] = None

    def chosen(self) -> "EngineLike":
        """The engine that these options mean."""
        from ..errors import BadHook
        from ..runs.engines.ray import Ray, check_installed

        words = {
            "actors": self.actors,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "address": self.address,
        }
        given = {name: value for name, value in words.items() if value is not None}
        if self.engine not in (None, "ray"):
            raise BadHook(f"--engine {self.engine!r} is unknown: say ray, or leave it out")
        if given and self.engine is None:
            raise BadHook(f"--{next(iter(given))} is of Ray's actors: add --engine ray")
        if self.engine is not None:
            check_installed()
        return None if self.engine is None else Ray(**given)  # pyright: ignore[reportArgumentType]
