"""The options that several commands share: model, prompts, hooks, generation and engine.

Each dataclass is a group of options, with a field for each option. Its methods check the options
before a model is loaded, and turn them into the objects of the library.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from typer import Argument, Option

import hookkit as hk

from ..arguments import leave_out_none
from ..errors import BadFile, BadHook, BadPrompt, NotOneToken
from ..files.untrusted import (
    decode_text,
    error_message,
    parse_json,
    read_hook_list,
    read_text,
)
from .output import OutputOptions, show_status

if TYPE_CHECKING:
    from ..models.words import WordLike
    from ..runs.engines.ray import EngineLike

MODEL_HELP = "A Hugging Face id, a folder or a .gguf file."

Texts: TypeAlias = list[str] | None

ModelName: TypeAlias = Annotated[str | None, Option(metavar="MODEL", help=MODEL_HELP)]
ModelArgument: TypeAlias = Annotated[str | None, Argument(help=MODEL_HELP)]
Revision: TypeAlias = Annotated[
    str | None, Option(metavar="REVISION", help="A branch, tag or commit of the model.")
]
Device: TypeAlias = Annotated[
    str | None, Option(metavar="DEVICE", help="cpu, cuda, mps; the best available if left out.")
]
Dtype: TypeAlias = Annotated[
    str | None, Option(metavar="DTYPE", help="The dtype of the computation: float32, bfloat16 …")
]
Prompt: TypeAlias = Annotated[
    str, Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")
]
Top: TypeAlias = Annotated[int, Option(min=1, help="How many tokens to show.")]
Watch: TypeAlias = Annotated[
    Texts, Option(metavar="TOKEN", help="A token, or id(28), to show at any rank; repeatable.")
]
Pos: TypeAlias = Annotated[
    str,
    Option(metavar="POS", help="The positions: -1 the last token, 3, 1:4, all, \"at('store')\"."),
]
Against: TypeAlias = Annotated[
    str | None, Option(help="Another token: the difference of their logits.")
]
Json: TypeAlias = Annotated[bool, Option("--json", help="Print all results as JSON.")]
Quiet: TypeAlias = Annotated[bool, Option("--quiet", "-q", help="Print no messages.")]


@dataclass(frozen=True)
class ModelOptions:
    """The options for the model."""

    model: ModelName = None
    revision: Revision = None
    device: Device = None
    dtype: Dtype = None

    def load(self, *, quiet: bool = False, **settings: Any) -> "hk.LM":
        """Loads the model, or the default model if none is named."""
        if not quiet:
            show_status(f"loading {self.model or 'the default model'} …")
        from ..models.loading import load

        names = [] if self.model is None else [self.model]
        arguments = _options_set(self, "revision", "device", "dtype") | settings
        try:
            return load(*names, **arguments)
        finally:
            show_status("")

    def words(self) -> list[str]:
        """Returns these options as a command line has them."""
        words: list[str] = []
        for name, value in _options_set(self, "model", "revision", "device", "dtype").items():
            words += [f"--{name}", value]
        return words


def _options_set(group: Any, *names: str) -> dict[str, Any]:
    """Returns the options of a group with these names, without those that are left out."""
    values = {name: getattr(group, name) for name in names}
    return leave_out_none(values)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options by which a prompt is the user's message of a chat."""

    chat: Annotated[
        bool, Option("--chat", help="The prompt is a user's message: apply the chat template.")
    ] = False
    system: Annotated[
        str | None, Option(metavar="TEXT", help="With --chat: the system message.")
    ] = None
    image: Annotated[
        Texts,
        Option(metavar="FILE", help="With --chat: an image before the user's text; repeatable."),
    ] = None

    def as_prompt(self, text: str) -> "str | hk.types.Chat":
        """Returns a text as the prompt that these options make of it."""
        if self.chat:
            return hk.chat(system=self.system, user=text, images=self.image or ())
        if self.system is not None:
            raise BadPrompt("--system is the first message of a chat: add --chat")
        if self.image:
            raise BadPrompt("--image is a part of the user's message in a chat: add --chat")
        return text

    def chat_words(self) -> list[str]:
        """Returns these options as a command line has them."""
        words = ["--chat"] if self.chat else []
        if self.system is not None:
            words += ["--system", self.system]
        for image in self.image or []:
            words += ["--image", image]
        return words


@dataclass(frozen=True)
class PromptOption(ChatOptions):
    """The options for the only prompt of a command."""

    prompt: Prompt

    def read(self) -> "str | hk.types.Chat":
        """Returns the prompt."""
        return self.as_prompt(read_prompt(self.prompt))


@dataclass(frozen=True)
class PromptOptions(ChatOptions):
    """The options for the prompts; several prompts are a batch."""

    prompt: Annotated[
        Texts,
        Argument(
            metavar="[PROMPT]...", help="The prompts; - reads them from standard input, one a line."
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="A file of prompts, one a line; .jsonl with 'text' or 'messages'."
        ),
    ] = None

    def read(self) -> "list[str | hk.types.Chat]":
        """Returns the prompts: those of the arguments, then those of the file."""
        prompts: list[Any] = []
        for argument in self.prompt or []:
            if argument == "-":
                prompts += _split_lines(_read_standard_input())
            else:
                prompts.append(_check_utf8(argument))
        if self.prompts is not None:
            prompts += _read_prompt_file(self.prompts)
        if not prompts:
            raise BadPrompt(
                "there is no prompt: give a text, --prompts FILE, or - for standard input"
            )
        return list(map(self._as_prompt, prompts))

    def _as_prompt(self, prompt: "str | hk.types.Chat") -> "str | hk.types.Chat":
        if isinstance(prompt, str):
            return self.as_prompt(prompt)
        if self.chat_words():
            raise BadPrompt(
                f"{self.prompts} has chats already: leave --chat and its --system and --image out"
            )
        return prompt


def _read_prompt_file(path: Path) -> list[Any]:
    try:
        lines = _split_lines(read_text(path).replace("\r\n", "\n"))
        return lines if path.suffix != ".jsonl" else list(map(_parse_prompt, lines, count()))
    except BadFile as error:
        cause = error_message(error.__cause__ or error)
        raise BadFile(f"{str(path)!r} cannot be read as a file of prompts: {cause}") from error


def _parse_prompt(line: str, number: int) -> "str | hk.types.Chat":
    """Returns the prompt of a line of JSON: a text, or an object with "text" or "messages"."""
    from ..models.chat import chat_of

    value = parse_json(line, f"line {number + 1}")
    if isinstance(value, dict) and set(value) == {"text"}:
        value = value["text"]
    prompt = value if isinstance(value, str) else chat_of(value, number)
    if prompt is None:
        raise BadPrompt(
            f'line {number + 1} is no prompt: write a text in quotes, {{"text": …}}, or '
            '{"messages": [{"role": "user", "content": …}]}'
        )
    return prompt


def read_prompt(prompt: str) -> str:
    """Returns the prompt, or the whole standard input for "-"."""
    if prompt == "-":
        return _read_standard_input().removesuffix("\n")
    return _check_utf8(prompt)


def _read_standard_input() -> str:
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt(f"{text!r} is no text in UTF-8: {error.reason}") from error
    return text


def _split_lines(text: str) -> list[str]:
    if not text:
        return []
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


# The verbs that are options, in the order in which their hooks act.
VERBS = ("ablate", "scale", "skip_block", "steer", "patch", "force", "ban", "boost")


@dataclass(frozen=True)
class HookedModelOptions(ModelOptions):
    """The options for a model and its hooks, from a file, as short texts, or by verb."""

    hook: Annotated[
        Texts,
        Option(
            metavar="HOOK",
            help="VERB:WHAT@WHERE, such as ablate:z.9.3, or a hook's JSON; repeatable.",
        ),
    ] = None
    hooks: Annotated[
        Path | None, Option(metavar="FILE", help="A YAML or JSON file with a list of such hooks.")
    ] = None
    ablate: Annotated[Texts, Option(metavar="SITE", help="SITE, such as z.9.3; repeatable.")] = None
    scale: Annotated[Texts, Option(metavar="SITE*FACTOR", help="SITE*FACTOR; repeatable.")] = None
    skip_block: Annotated[Texts, Option(metavar="LAYER", help="LAYER; repeatable.")] = None
    steer: Annotated[
        Texts, Option(metavar="FILE*SCALE", help="FILE*SCALE, or SITE:FILE*SCALE; repeatable.")
    ] = None
    patch: Annotated[
        Texts, Option(metavar="SITE:TEXT", help="SITE:TEXT, with the values of that text.")
    ] = None
    force: Annotated[
        Texts,
        Option(
            metavar="TOKEN", help="TOKEN at every step, or TOKEN@STEP; several from that step on."
        ),
    ] = None
    ban: Annotated[
        Texts,
        Option(
            metavar="TOKEN",
            help="A token, a text, or word:coffee in all spellings, never generated.",
        ),
    ] = None
    boost: Annotated[
        Texts, Option(metavar="TOKEN=AMOUNT", help="TOKEN=AMOUNT in logits; repeatable.")
    ] = None

    def _texts(self) -> list[str]:
        texts = list(self.hook or [])
        for verb in VERBS:
            texts += [f"{verb}:{value}" for value in getattr(self, verb) or []]
        return texts

    def refuse_hooks(self, reason: str) -> None:
        """Raises `BadHook` if there are hooks; `reason` says what takes their place."""
        texts = self._texts()
        if self.hooks is not None or texts:
            hook = texts[0] if texts else str(self.hooks)
            raise BadHook(f"{reason}, and {hook} is a hook: leave one of them out")

    def load_with_hooks(
        self, output: OutputOptions, watch: Texts = None, *, purpose: str = "", **settings: Any
    ) -> "tuple[hk.LM, list[hk.types.Hook], list[int]]":
        """Checks the options, and returns the model, the hooks and the ids of the watched tokens.

        With `purpose`, which says what the hooks are for, at least one hook is required. `settings`
        are further arguments of `hk.load`.
        """
        output.check()
        texts = [] if self.hooks is None else read_hook_list(self.hooks)
        texts += self._texts()
        if texts:
            _check_hooks(texts)
        elif purpose:
            raise BadHook(
                f"there is no hook, and {purpose}: "
                "give --force ' coffee', --ablate z.9.3, --hook, --hooks …"
            )
        lm = self.load(quiet=output.quiet, **settings)
        watched_ids = token_ids(lm, watch)
        hooks = [] if self.hooks is None else hk.load_hooks(self.hooks, lm=lm)
        hooks += [hk.parse_hook(text, lm=lm) for text in self._texts()]
        for hook in hooks:
            _note_texts(lm, hook, output.note)
        return lm, hooks, watched_ids


def _check_hooks(texts: list[str]) -> None:
    """Raises the errors of hooks that can be found without a model."""
    from ..hooks.text import check_hook  # brings torch

    for text in texts:
        check_hook(text)


def _note_texts(lm: "hk.LM", hook: "hk.types.Hook", note: Callable[[str], None]) -> None:
    """Notes a text that is one token with a space before it, which is what users often mean."""
    for token in [*getattr(hook, "tokens", ()), getattr(hook, "token", None)]:
        text = token.text if getattr(token, "exact", False) else " "
        if text.startswith(" "):
            continue
        spaced = f" {text}"
        with suppress(NotOneToken):
            lm.token(spaced)
            note(
                f"{text!r} is {len(token.ids(lm))} tokens here, taken one after the other; "
                f"{spaced!r} is one token"
            )


SAMPLING_LIMITS = {  # the largest value of an option of sampling, and its range in words
    "temperature": (math.inf, "more than 0"),
    "top_k": (math.inf, "more than 0"),
    "top_p": (1, "more than 0, at most 1"),
}


@dataclass(frozen=True)
class GenerationOptions:
    """The options for the generation of text."""

    max_new_tokens: Annotated[int, Option(min=1, help="How many tokens to generate at most.")] = 20
    sample: Annotated[
        bool, Option("--sample", help="Sample, instead of the most likely token each time.")
    ] = False
    temperature: Annotated[float | None, Option(help="With --sample.")] = None
    top_k: Annotated[int | None, Option(help="With --sample.")] = None
    top_p: Annotated[float | None, Option(help="With --sample.")] = None
    seed: Annotated[int | None, Option(help="The seed of the sampling.")] = None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `generate`."""
        sampling = _options_set(self, *SAMPLING_LIMITS)
        if sampling and not self.sample:
            raise BadHook(
                "--temperature, --top-k and --top-p are options of sampling: add --sample"
            )
        for name, value in sampling.items():
            most, limit = SAMPLING_LIMITS[name]
            if not 0 < value <= most:  # transformers would end in a traceback
                option = name.replace("_", "-")
                raise BadHook(f"--{option} {value} is out of range: give a number {limit}")
        length = self.max_new_tokens
        return {"max_new_tokens": length, "do_sample": self.sample, "seed": self.seed, **sampling}


def parse_positions(text: str) -> Any:
    """Returns the positions of a --pos option; a full slice for "all"."""
    from ..hooks.text_grammar import parse_place

    positions = parse_place(text, "--pos")
    return slice(None) if positions is None else positions


def parse_token(text: str) -> "WordLike":
    """Returns the token of an option: a plain text, a text in quotes, id(28) or word:coffee."""
    from ..hooks.text_grammar import parse_bare_token

    return parse_bare_token(text)


def optional_token_id(lm: "hk.LM", text: str | None) -> int | None:
    """Returns the id of the token of an option, None if it is left out."""
    from ..models.tokens import check_token

    return None if text is None else lm.token(check_token(parse_token(text)))


def token_ids(lm: "hk.LM", tokens: list[str] | None) -> list[int]:
    """Returns the ids of the tokens and words of an option, before anything runs."""
    from ..models import words

    return words.token_ids(lm, map(parse_token, tokens or []))


@dataclass(frozen=True)
class EngineOptions:
    """The options for the engine: this process, or Ray's actors."""

    engine: Annotated[str | None, Option(help="ray; this process if left out.")] = None
    actors: Annotated[
        int | None, Option(min=1, help="With ray: how many actors; as many as fit if left out.")
    ] = None
    cpus: Annotated[
        float | None, Option(min=0, help="With ray: CPUs of each actor; 1 if left out.")
    ] = None
    gpus: Annotated[
        float | None, Option(min=0, help="With ray: GPUs of each actor; 0 if left out.")
    ] = None
    address: Annotated[str | None, Option(help="With ray: address of a cluster.")] = None

    def create(self) -> "EngineLike":
        """Returns the engine, or None for this process."""
        settings = _options_set(self, "actors", "cpus", "gpus", "address")
        if self.engine not in (None, "ray"):
            raise BadHook(f"--engine {self.engine!r} is unknown: say ray, or leave it out")
        if self.engine is None:
            if settings:
                raise BadHook(
                    f"--{next(iter(settings))} is an option of Ray's actors: add --engine ray"
                )
            return None
        from ..runs.engines.ray import check_installed

        check_installed()
        return hk.Ray(**settings)


@dataclass(frozen=True)
class ServingOptions:
    """The options for a model in a process of vLLM."""

    engine: Annotated[
        str | None, Option(help="vllm serves the model in a process; this one if left out.")
    ] = None
    engine_argument: Annotated[
        Texts,
        Option(
            metavar="NAME=VALUE",
            help="With vllm: one of its arguments, such as max_model_len=2048; repeatable.",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of `hk.load`, checked as far as is possible without a model."""
        texts = self.engine_argument or []
        if self.engine is None:
            if texts:
                raise BadHook(f"--engine-argument {texts[0]} is one of vLLM's: add --engine vllm")
            return {}
        if self.engine != "vllm":
            raise BadHook(f"--engine {self.engine!r} is unknown: say vllm, or leave it out")
        from ..models.engine import check_engine

        arguments = dict(map(_parse_argument, texts))
        check_engine(self.engine, arguments)
        return {"engine": self.engine, **arguments}


def _parse_argument(text: str) -> tuple[str, Any]:
    """Returns the name and the value of NAME=VALUE. A value that is no JSON is a text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise BadHook(f"--engine-argument {text!r}: say NAME=VALUE, such as max_model_len=2048")
    with suppress(ValueError):
        return name, json.loads(value)
    return name, value


def check_result_folder(option: str, path: Path) -> None:
    """Raises `BadFile` if the folder that an option names is a file."""
    if path.exists() and not path.is_dir():
        raise BadFile(f"{option} {str(path)!r} is a file: give the name of a folder")
