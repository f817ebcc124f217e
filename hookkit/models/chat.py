"""Chats as prompts: messages that the tokenizer's own template turns into token ids.

    hk.chat(system="You answer in one word.", user="What do you drink?")

`render` returns the ids of a chat and which message each token belongs to. A message's content is
located by rendering the chat once more with other content in its place: the two renderings differ
there and nowhere else. So templates may trim contents, drop the reasoning of earlier turns, or put
the system prompt into the user's message. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, takewhile
from operator import eq
from os import PathLike
from pathlib import Path
from typing import Any

from ..arguments import as_items, check_arguments, describe, is_mapping, shorten
from ..errors import BadPrompt

ROLES = ("system", "user", "assistant")  # the keywords of `chat`, in the order of a conversation
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message besides its content
THINKING = ("enable_thinking", "thinking")  # the variable of templates, by family
KEYS = ("messages", "tools", "think")  # of a chat in JSON
MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIRST_MARKER = 0x4E00  # a letter of a script that few contents use


@dataclass(frozen=True, repr=False)
class Chat:
    """A conversation as a prompt. Made by `chat`.

    messages  mappings with "role" and "content", in order
    tools     JSON schemas of the functions that the model may call
    think     whether the template asks the model to think; None for the template's default
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool | None = None

    def __post_init__(self) -> None:
        messages = as_items(self.messages)
        if not messages:
            raise BadPrompt("a chat was given no message: give hk.chat(user='…')")
        for number, message in enumerate(messages):
            _check_message(message, number)
        object.__setattr__(self, "messages", tuple(_plain(messages, "its messages")))
        tools = as_items(self.tools) or []
        object.__setattr__(self, "tools", tuple(_plain(tools, "its tools")))
        if self.think not in (None, True, False):
            raise BadPrompt(f"think={describe(self.think)}: say True or False, or leave it out")

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each message."""
        return tuple(message["role"] for message in self.messages)

    @property
    def has_media(self) -> bool:
        """True if a message has an image, a video or sound, which a processor reads."""
        parts: list[Mapping[str, Any]] = []
        for message in self.messages:
            if isinstance(message.get("content"), list):
                parts += message["content"]
        return any(part.get("type", "text") != "text" for part in parts)

    @property
    def is_prefilled(self) -> bool:
        """True if the last message is the beginning of the model's own answer."""
        return self.roles[-1] == "assistant"

    def to_json(self) -> str:
        """Returns the chat as JSON. Equal chats have equal JSON."""
        fields = {name: getattr(self, name) for name in KEYS}
        return json.dumps(
            {name: value for name, value in fields.items() if value not in ((), None)}
        )

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        words = []
        for message in self.messages:
            words.append(f"{message['role']}={shorten(str(message.get('content')))!r}")
        return f"chat({', '.join(words)})"


@check_arguments
def chat(
    messages: Sequence[Mapping[str, Any]] | None = None,
    *,
    system: str | None = None,
    user: str | None = None,
    assistant: str | None = None,
    images: Sequence[Any] = (),
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] = (),
    think: bool | None = None,
) -> Chat:
    """Returns a conversation as a prompt, which the tokenizer's own chat template turns into ids.

    Give one message of each role by its keyword, or a list of messages with "role" and "content".
    If the last message is the assistant's, the model continues it; otherwise it begins an answer.
    `tools` are functions or JSON schemas, and `think` says whether a model that can think before
    it answers is asked to. A plain list of messages is a prompt, too, and a list of such lists is
    several prompts.

    `images` stand before the user's text: paths of files, addresses, or images of PIL. In a list of
    messages, a content may have parts: {"type": "image", "path": "cat.png"} and {"type": "text",
    "text": "What is this?"}. A chat with images is read by the LM's processor, with its template.

    Reading the prompt raises `BadPrompt` if the tokenizer has no chat template, or one that refuses
    the chat or ignores a message, the tools or `think`.

    >>> chat(system="Answer in one word.", user="What do you drink?")
    chat(system='Answer in one word.', user='What do you drink?')
    """
    contents = dict(zip(ROLES, (system, user, assistant), strict=True))
    parts: dict[str, Any] = {}
    for role, content in contents.items():
        if content is not None:
            parts[role] = content
    if images:
        parts["user"] = [
            *map(_image_part, images),
            {"type": "text", "text": _text_beside(parts)},
        ]
    if messages is None:
        messages = [{"role": role, "content": content} for role, content in parts.items()]
    elif parts:
        raise BadPrompt(
            f"a chat was given a list of messages and {next(iter(parts))}= too: put it into the "
            "list, {'role': …, 'content': …}"
        )
    return Chat(tuple(messages), tuple(map(_schema_of_tool, tools)), think)


def _text_beside(given: Mapping[str, Any]) -> str:
    if "user" not in given:
        raise BadPrompt(
            "images= belong to the user's message: give user='…' too; in a list of messages, an "
            "image is a part of a content, {'type': 'image', 'path': …}"
        )
    return given["user"]


def _image_part(image: Any) -> dict[str, str]:
    """Returns an image as a part of a message, ready for JSON."""
    if hasattr(image, "save"):  # of PIL
        file = BytesIO()
        image.save(file, format="PNG")
        return {"type": "image", "base64": b64encode(file.getvalue()).decode()}
    if not isinstance(image, str | PathLike):
        raise BadPrompt(
            f"images= has {describe(image)}: give the path of a file, an address, or an image of "
            "PIL"
        )
    name = str(image)
    if name.startswith(("http://", "https://")):
        return {"type": "image", "url": name}
    if not Path(name).is_file():
        raise BadPrompt(f"the image {name!r} is no file: give the path of an image")
    return {"type": "image", "path": name}


def is_message(value: Any) -> bool:
    """True for a mapping that is one message of a chat."""
    return is_mapping(value) and "role" in value


def chat_of(value: Any, number: int) -> Chat | None:
    """Returns the chat that a prompt is: a `Chat`, a list of messages, or a mapping with them.

    Returns None for other prompts. `number` is the prompt's row.
    """
    if isinstance(value, Chat):
        return value
    if is_message(value):
        raise BadPrompt(
            f"prompt {number} is one message of a chat: give a list of messages, or "
            "hk.chat(user='…')"
        )
    if is_mapping(value):
        return _chat_of_mapping(value, number) if "messages" in value else None
    if isinstance(value, list | tuple) and value and is_message(value[0]):
        return Chat(tuple(value))
    return None


def _chat_of_mapping(value: Any, number: int) -> Chat:
    """Returns the chat of a mapping with "messages", as files of chats have them."""
    unknown = [str(name) for name in value if name not in KEYS]
    if unknown:
        raise BadPrompt(
            f"prompt {number} has 'messages' and {unknown[0]!r}, which would be ignored: a chat "
            f"has {', '.join(KEYS)}"
        )
    return Chat(value["messages"], value.get("tools") or (), value.get("think"))


def _check_message(message: Any, number: int) -> None:
    if not is_mapping(message):
        hint = ""
        if as_items(message) is not None:
            hint = ". For several chats, give a list of them as the prompts"
        raise BadPrompt(
            f"message {number} of a chat is {describe(message)}: give a mapping with 'role' and "
            f"'content'{hint}"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadPrompt(
            f"message {number} of a chat has the role {describe(role)}: say 'system', 'user', "
            "'assistant' or another role of the template"
        )
    is_call = content is None and any(message.get(name) for name in ("tool_calls", *REASONING))
    if isinstance(content, str) or is_call:
        return
    parts = as_items(content)
    if parts is None or not all(map(is_mapping, parts)):
        raise BadPrompt(
            f"message {number} of a chat, the {role}'s, has {describe(content)} as its content: "
            "give a text"
        )


def _plain(values: list[Any], what: str) -> list[Any]:
    """Returns a copy of values that JSON can express."""
    try:
        return json.loads(json.dumps([dict(value) for value in values]))
    except (TypeError, ValueError) as error:
        raise BadPrompt(
            f"a chat has something in {what} that is no text, number, list or mapping ({error}); "
            "for an image, hk.chat(user='…', images=[…]), or what the model's processor returns"
        ) from error


def _schema_of_tool(tool: Any) -> Any:
    """Returns the JSON schema of a function that the model may call."""
    if is_mapping(tool):
        return tool
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # it reads docstrings and annotations, and has many errors
        raise BadPrompt(
            f"the tool {describe(tool)} has no JSON schema: give functions with annotations and a "
            f"docstring, or schemas ({error})"
        ) from error


# ---- rendered by a tokenizer, or by a processor


def read_with_processor(processor: Any, chat: Chat) -> Any:
    """Returns what a processor returns for a chat with images: ids, and what the model reads too.

    Raises `BadPrompt` if there is no processor, or if its template refuses or ignores a part of
    the chat.
    """
    if getattr(processor, "chat_template", None) is None:
        what = "this LM has no processor: make it with hk.LM(model, processor)"
        if processor is not None:
            what = f"the {type(processor).__name__} has no chat template: set its chat_template"
        raise BadPrompt(f"the prompt is a chat with an image, and {what}")
    template = _Template(processor, chat)
    for _ in _locate_contents(template, chat, template.text(chat.messages)):
        pass  # raises for a text that the template ignores
    return template.apply(chat.messages, tokenize=True, return_tensors="pt")


@dataclass(frozen=True)
class Rendering:
    """The token ids of a chat, and the number of the message that each token belongs to.

    A token that the template added belongs to none. `turns` is empty if the template changes the
    contents, so that they are not found in it.
    """

    ids: tuple[int, ...]
    turns: tuple[int | None, ...]


def render(tokenizer: Any, chat: Chat) -> Rendering:
    """Returns the token ids of a chat by the tokenizer's own template, special tokens once.

    Raises `BadPrompt` if there is no template, or if it refuses or ignores a part of the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        what = "this model came without a tokenizer"
        if tokenizer is not None:
            what = f"this tokenizer, a {type(tokenizer).__name__}, has no chat template"
        raise BadPrompt(
            f"the prompt is a chat, and {what}: write the prompt as a text, or set "
            "tokenizer.chat_template"
        )
    template = _Template(tokenizer, chat)
    text, encoding = template.text(chat.messages), template.encode(chat.messages)
    ids = tuple(encoding["input_ids"])
    spans = list(_locate_contents(template, chat, text))
    if None in spans or "offset_mapping" not in encoding:
        return Rendering(ids, ())
    owners: list[int | None] = [None] * len(text)  # of each character
    for turn, start, end in filter(None, spans):
        owners[start:end] = [turn] * (end - start)
    turns = _turns_of_tokens(owners, encoding["offset_mapping"])
    return Rendering(ids, tuple(_extend_by_mask(turns, template.assistant_mask(chat, ids))))


class _Template:
    """The chat template of a tokenizer or a processor, with the settings of a chat."""

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] = {}
        self.ending = {"add_generation_prompt": True}
        if chat.is_prefilled:
            self.ending = {"continue_final_message": True}
        if chat.tools:
            self.settings["tools"] = list(chat.tools)
            if self.text(chat.messages) == self.text(chat.messages, tools=None):
                raise BadPrompt("a chat has tools, and this tokenizer's template ignores them")
        if chat.think is not None:
            self.settings[self._thinking_variable(chat)] = chat.think

    def text(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """Returns the rendered text."""
        return self.apply(messages, tokenize=False, **settings)

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        """Returns the ids, with the characters of each token where the tokenizer knows them."""
        options = {"return_offsets_mapping": self.tokenizer.is_fast, "verbose": False}
        return self.apply(messages, tokenizer_kwargs=options)

    def assistant_mask(self, chat: Chat, ids: Sequence[int]) -> list[int]:
        """Returns 1 for each token that the template marks as the assistant's, else 0.

        transformers gives the mask of a whole last message only; a prefilled one begins it.
        """
        if not MARKS_GENERATION.search(self.tokenizer.get_chat_template(tools=chat.tools or None)):
            return [0] * len(ids)
        ending = {"continue_final_message": False}
        whole = self.apply(chat.messages, return_assistant_tokens_mask=True, **ending)
        n_same = _common_length(ids, whole["input_ids"])
        return [*whole["assistant_masks"][:n_same], *[0] * (len(ids) - n_same)]

    def _thinking_variable(self, chat: Chat) -> str:
        for name in THINKING:
            texts = {self.text(chat.messages, **{name: value}) for value in (True, False)}
            if len(texts) == 2:
                return name
        raise BadPrompt(
            f"a chat has think={chat.think}, and this tokenizer's template writes the same with "
            "and without thinking: leave think out"
        )

    def apply(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        """Returns what the template gives: a text, or ids with what belongs to them."""
        settings = {"return_dict": True, **self.ending, **self.settings, **settings}
        try:
            return self.tokenizer.apply_chat_template(list(map(dict, messages)), **settings)
        except Exception as error:  # templates raise what they like
            raise BadPrompt(
                f"this tokenizer's chat template refuses the chat: {type(error).__name__}: {error}"
            ) from error


def _locate_contents(
    template: _Template, chat: Chat, text: str
) -> Iterator[tuple[int, int, int] | None]:
    """Returns the message, the start and the end of each content in the rendered text.

    It is None for a content that the template has changed. Raises `BadPrompt` for one that it
    ignores.
    """
    for turn, message in enumerate(chat.messages):
        for path in _paths_of_texts(message):
            content = _text_at(message, path)
            messages = list(chat.messages)
            messages[turn] = _with_text(message, path, _letter_outside(content))
            try:
                altered = template.text(messages)
            except BadPrompt:
                yield None
                continue
            if altered == text and path[0] == "content" and content.strip():
                raise BadPrompt(
                    f"this tokenizer's chat template ignores message {turn}, the "
                    f"{message['role']}'s: {shorten(content)!r}. Leave it out, or write it into "
                    "another message"
                )
            start, end = _changed_span(text, altered)
            yield (turn, start, end) if _is_part(text[start:end], content) else None


def _changed_span(text: str, altered: str) -> tuple[int, int]:
    """Returns the start and end of the part in which a text differs from an altered one."""
    start = _common_length(text, altered)
    after = _common_length(text[start:][::-1], altered[start:][::-1])
    return start, len(text) - after


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many items two texts or rows have in common at their beginnings."""
    return len(list(takewhile(bool, map(eq, first, second))))


def _paths_of_texts(message: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Returns where the texts of a message are: a content may have several parts."""
    for name in ("content", *REASONING):
        value = message.get(name)
        if isinstance(value, str):
            yield (name,)
        elif isinstance(value, list):
            texts = [n for n, part in enumerate(value) if isinstance(part.get("text"), str)]
            for number in texts:
                yield (name, number, "text")


def _text_at(message: Any, path: tuple[Any, ...]) -> str:
    for key in path:
        message = message[key]
    return message


def _with_text(message: Any, path: tuple[Any, ...], text: str) -> Any:
    """Returns a message with another text in one place."""
    altered = json.loads(json.dumps(message))
    _text_at(altered, path[:-1])[path[-1]] = text  # pyright: ignore
    return altered


def _letter_outside(content: str) -> str:
    """Returns a letter that a content does not have."""
    letters = map(chr, range(FIRST_MARKER, FIRST_MARKER + len(content) + 1))
    return next(letter for letter in letters if letter not in content)


def _is_part(piece: str, content: str) -> bool:
    """True if what a template wrote is a part of the content, as it is or as JSON has it."""
    forms = (content, json.dumps(content), json.dumps(content, ensure_ascii=False))
    return any(piece in form for form in forms)


def _turns_of_tokens(
    owners: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> list[int | None]:
    """Returns for each token the message of which it covers a character, or None."""
    turns: list[int | None] = []
    previous = 0  # some tokenizers leave the spaces of a token out of its characters
    for start, end in offsets:
        covered = owners[min(start, previous) : max(end, previous)]
        turns.append(next((turn for turn in covered if turn is not None), None))
        previous = max(previous, end)
    return turns


def _extend_by_mask(turns: list[int | None], mask: Sequence[int]) -> list[int | None]:
    """Returns the turns with all tokens of the assistant's that the template marks.

    A run of marked tokens is one message, and may have more than its content, such as its end.
    """
    extended = list(turns)
    start = 0
    for is_marked, run in groupby(mask):
        end = start + len(list(run))
        members = set(turns[start:end]) - {None}
        if is_marked and len(members) == 1:
            extended[start:end] = list(members) * (end - start)
        start = end
    return extended
