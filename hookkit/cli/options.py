"""The options that several commands share: model, prompts, hooks, generation and engine.

Each dataclass is a group of options, with a field for each option. Its methods check the options
before a model is loaded, and turn them into the objects of the library.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .output import show_status

if TYPE_CHECKING:
    from ..hooks.base import Hook
    from ..models.lm import LM
    from ..runs.engines.ray import EngineLike


Top: TypeAlias = Annotated[int, typer.Option(min=1, help="How many tokens to show.")]
Watch: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN", help="A token, or id(28), to show at any rank; repeatable."),
]
Pos: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="POS", help="The positions: -1 the last token, 3, 1:4, all, \"at('store')\"."
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option(help="The seed of the random draws.")]
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
    typer.Option(metavar="DEVICE", help="cpu, cuda, mps; the best available if left out."),
]


@dataclass(frozen=True)
class ModelOptions:
    """The options for the model."""

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
        typer.Option(metavar="DTYPE", help="The dtype of the computation: float32, bfloat16 …"),
    ] = None

    def load(self, *, quiet: bool = False, **settings: Any) -> "LM":
        """Loads the model, or the default model if none is named."""
        if not quiet:
            show_status(f"loading {self.model or 'the default model'} …")
        from ..models.loading import load

        arguments = _options_set(self, "revision", "device", "dtype")
        arguments |= settings
        try:
            return load(**arguments) if self.model is None else load(self.model, **arguments)
        finally:
            show_status("")


def _options_set(group: Any, *names: str) -> dict[str, Any]:
    """Returns the options of a group with these names, without those that are left out."""
    values = {name: getattr(group, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class PromptOptions:
    """The options for the prompts; several prompts are a batch."""

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
        """Returns the prompts: those of the arguments, then those of the file."""
        from ..errors import BadPrompt

        prompts: list[str] = []
        for argument in self.prompt or []:
            if argument == "-":
                prompts += _split_lines(_read_standard_input())
            else:
                prompts.append(_check_utf8(argument))
        if self.prompts is not None:
            prompts += _split_lines(_read_prompt_file(self.prompts))
        if not prompts:
            raise BadPrompt(
                "there is no prompt: give a text, --prompts FILE, or - for standard input"
            )
        return prompts


def read_prompt(prompt: str) -> str:
    """Returns the prompt, or the whole standard input for "-"."""
    if prompt == "-":
        return _read_standard_input().removesuffix("\n")
    return _check_utf8(prompt)


def _read_standard_input() -> str:
    """Returns the text of standard input, or raises `BadPrompt`."""
    from ..errors import BadPrompt
    from ..files.untrusted import decode_text

    if sys.stdin is None or sys.stdin.closed:
        raise BadPrompt(
            "standard input is closed, and - reads a prompt from it: give a text, or --prompts FILE"
        )
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise BadPrompt(f"standard input cannot be read: {error.strerror or error}") from error
    return decode_text(data, "standard input", error=BadPrompt).replace("\r\n", "\n")


def _check_utf8(text: str) -> str:
    """Returns a text of the command line, or raises `BadPrompt` if its bytes are not UTF-8."""
    from ..errors import BadPrompt

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt(f"{text!r} is no text in UTF-8: {error.reason}") from error
    return text


def _split_lines(text: str) -> list[str]:
    if not text:
        return []
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _read_prompt_file(path: Path) -> str:
    from ..errors import BadFile
    from ..files.untrusted import error_message, read_text

    try:
        return read_text(path).replace("\r\n", "\n")
    except BadFile as error:
        cause = error_message(error.__cause__ or error)
        raise BadFile(f"{str(path)!r} cannot be read as a file of prompts: {cause}") from error


# The verbs that are options, in the order in which their hooks act.
VERBS = ("ablate", "scale", "skip_block", "steer", "patch", "force", "ban", "boost")


@dataclass(frozen=True)
class HookOptions:
    """The options for the hooks: from a file, as short texts, and the most common ones by verb."""

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
        typer.Option(metavar="SITE:TEXT", help="SITE:TEXT, with the values of that text."),
    ] = None
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="TOKEN at every step, or TOKEN@STEP; a phrase from that step on."
        ),
    ] = None
    ban: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="A token, or a phrase, that is never generated."),
    ] = None
    boost: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN=AMOUNT", help="TOKEN=AMOUNT in logits; repeatable."),
    ] = None

    def _texts(self) -> list[str]:
        """Returns the hooks of the command line as texts."""
        texts = [*(self.hook or [])]
        for verb in VERBS:
            texts += [f"{verb}:{value}" for value in getattr(self, verb) or []]
        return texts

    def check(self, *, purpose: str = "") -> None:
        """Raises the errors that can be found without a model.

        With `purpose`, which says what the hooks are for, at least one hook is required.
        """
        from ..errors import BadHook
        from ..files.untrusted import read_hook_list

        texts = [] if self.hooks is None else read_hook_list(self.hooks)
        texts += self._texts()
        if purpose and not texts:
            raise BadHook(
                f"there is no hook, and {purpose}: "
                "give --force ' coffee', --ablate z.9.3, --hook, --hooks …"
            )
        if texts:
            from ..hooks.text import check_hook

            for text in texts:
                check_hook(text)

    def read(self, lm: "LM", note: Callable[[str], None]) -> list["Hook"]:
        """Returns the hooks, those of the file first. `note` receives hints for the user."""
        from ..hooks.text import load_hooks, parse_hook

        hooks = [] if self.hooks is None else load_hooks(self.hooks, lm=lm)
        hooks += [parse_hook(text, lm=lm) for text in self._texts()]
        for hook in hooks:
            _note_phrases(lm, hook, note)
        return hooks


def _note_phrases(lm: "LM", hook: "Hook", note: Callable[[str], None]) -> None:
    """Notes a phrase that is one token with a space before it, which is what users often mean."""
    from ..errors import NotOneToken
    from ..hooks.conditions import Phrase

    for phrase in [*getattr(hook, "tokens", ()), getattr(hook, "token", None)]:
        if not isinstance(phrase, Phrase) or not isinstance(phrase.words, str):
            continue
        if phrase.words.startswith(" "):
            continue
        spaced = f" {phrase.words}"
        try:
            lm.token(spaced)
        except NotOneToken:
            continue
        note(
            f"{phrase.words!r} is {len(phrase.ids(lm))} tokens here, and taken as a phrase; "
            f"{spaced!r} is one token"
        )


@dataclass(frozen=True)
class GenerationOptions:
    """The options for the generation of text."""

    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to generate at most.")
    ] = 20
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample, instead of the most likely token each time.")
    ] = False
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None
    seed: Annotated[int | None, typer.Option(help="The seed of the sampling.")] = None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `generate`."""
        from ..errors import BadHook

        sampling = _options_set(self, "temperature", "top_k", "top_p")
        if sampling and not self.sample:
            raise BadHook(
                "--temperature, --top-k and --top-p are options of sampling: add --sample"
            )
        for name, value in sampling.items():
            limit = "more than 0"
            is_valid = value > 0
            if name == "top_p":
                limit = "more than 0, at most 1"
                is_valid = 0 < value <= 1
            if not is_valid:  # transformers would end in a traceback
                option = name.replace("_", "-")
                raise BadHook(f"--{option} {value} is out of range: give a number {limit}")
        length = self.max_new_tokens
        return {"max_new_tokens": length, "do_sample": self.sample, "seed": self.seed, **sampling}


def parse_positions(text: str) -> Any:
    """Returns the positions of a --pos option; a full slice for "all"."""
    from ..hooks.text_grammar import parse_place

    positions = parse_place(text, "--pos")
    return slice(None) if positions is None else positions


def parse_token(text: str) -> "str | int":
    """Returns the token of an option: a plain text, a text in quotes, or an id such as id(28)."""
    from ..hooks.text_grammar import parse_bare_token

    token: Any = parse_bare_token(text)
    return token if isinstance(token, str | int) else text


def token_ids(lm: "LM", tokens: list[str] | None) -> list[int]:
    """Returns the ids of the tokens of an option, before anything runs."""
    return [lm.token(parse_token(text)) for text in tokens or []]


@dataclass(frozen=True)
class EngineOptions:
    """The options for the engine: this process, or Ray's actors."""

    engine: Annotated[str | None, typer.Option(help="ray; this process if left out.")] = None
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="With ray: how many actors; as many as fit if left out."),
    ] = None
    cpus: Annotated[
        float | None, typer.Option(min=0, help="With ray: CPUs of each actor; 1 if left out.")
    ] = None
    gpus: Annotated[
        float | None, typer.Option(min=0, help="With ray: GPUs of each actor; 0 if left out.")
    ] = None
    address: Annotated[str | None, typer.Option(help="With ray: address of a cluster.")] = None

    def create(self) -> "EngineLike":
        """Returns the engine, or None for this process."""
        from ..errors import BadHook
        from ..runs.engines.ray import Ray, check_installed

        settings = _options_set(self, "actors", "cpus", "gpus", "address")
        if self.engine not in (None, "ray"):
            raise BadHook(f"--engine {self.engine!r} is unknown: say ray, or leave it out")
        if self.engine is None:
            if settings:
                raise BadHook(
                    f"--{next(iter(settings))} is an option of Ray's actors: add --engine ray"
                )
            return None
        check_installed()
        return Ray(**settings)
