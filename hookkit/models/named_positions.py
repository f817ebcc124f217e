"""Positions that depend on what a row says: of a text, of a message of a chat, or of an image."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from ..arguments import shorten
from ..errors import OutOfRange, Unsupported
from .lm import LM
from .positions import AUDIO, IMAGE, At, Named, Role, TextPart, Turn
from .prompt_row import Row

# The configuration's names of the ids that stand for an image, a video or sound in a prompt.
PLACEHOLDERS = {
    IMAGE: ("image_token_id", "image_token_index", "video_token_id"),
    AUDIO: ("audio_token_id", "audio_token_index"),
}


def find_positions(lm: LM, row: Sequence[int], place: Named) -> Row:
    """Returns the positions of a row's tokens that cover a text, that a role says, or that stand
    for an image."""
    if isinstance(place, At):
        return positions_of_text(lm, row, place)
    if place in PLACEHOLDERS:
        return _positions_of_placeholders(lm, row, place)
    turns, speakers = getattr(row, "turns", ()), getattr(row, "speakers", ())
    if not turns:
        what = "is a chat whose messages its template changes, or with an image"
        if not speakers:
            what = "is no chat"
        raise OutOfRange(
            f"{place!r} was asked for, and {shorten(lm.text(row))!r} {what}, so it is not known "
            "who says its tokens: give hk.chat(user='…'), or positions as numbers or hk.at('text')"
        )
    wanted = _messages_at(place, speakers)
    positions = [position for position, turn in enumerate(turns) if turn in wanted]
    if not positions:
        raise OutOfRange(
            f"{place!r} was asked for, and it has no token in {shorten(lm.text(row))!r}"
        )
    return tuple(positions)


def _positions_of_placeholders(lm: LM, row: Sequence[int], part: TextPart) -> Row:
    ids = placeholder_ids(lm, part)
    positions = tuple(position for position, token_id in enumerate(row) if token_id in ids)
    if not positions:
        raise OutOfRange(
            f"{part!r} was asked for, and {shorten(lm.text(row))!r} has no token that stands for "
            f"{part.value}"
        )
    return positions


def _messages_at(place: Role | Turn | Any, speakers: Sequence[str]) -> Sequence[int | None]:
    """Returns the numbers of the messages of a role or a turn; None for the template."""
    numbers: list[Any] = [None]
    which = None
    if isinstance(place, Role):
        numbers = [turn for turn, speaker in enumerate(speakers) if speaker == place.name]
        which = place.which
    elif isinstance(place, Turn):
        numbers, which = list(range(len(speakers))), place.number
    if numbers and which is None:
        return numbers
    if which is None or not -len(numbers) <= which < len(numbers):
        raise OutOfRange(
            f"{place!r} was asked for, and the chat's messages are from {', '.join(speakers)}, in "
            "this order"
        )
    return [numbers[which]]


def positions_of_text(lm: LM, row: Sequence[int], at: At) -> Row:
    """Returns the positions of the tokens of a row that cover a text."""
    if min(row, default=0) < 0:
        raise Unsupported(
            f"{at!r}: the model was given embeddings, whose tokens are unknown; give positions "
            "as numbers"
        )
    # A token begins where the text of the tokens before it ends. Half a character decodes to "�".
    prefixes = [lm.text(row[: end + 1]) for end in range(len(row))]
    starts = [0] + [len(prefix.rstrip("�")) for prefix in prefixes[:-1]]
    ends = list(map(len, prefixes))
    first = _occurrence(prefixes[-1], at)
    last = first + len(at.text)
    return tuple(n for n in range(len(row)) if starts[n] < last and ends[n] > first)


def _occurrence(text: str, at: At) -> int:
    """Returns the index at which the occurrence that `at` means begins in a text."""
    starts = [start for start in range(len(text)) if text.startswith(at.text, start)]
    if not starts:
        raise OutOfRange(f"{at!r} was asked for, and {shorten(text)!r} does not have it")
    if at.which is None and len(starts) > 1:
        raise OutOfRange(
            f"{at.text!r} occurs {len(starts)} times in {shorten(text)!r}: say which, "
            f"at({at.text!r}, which=0) for the first or which=-1 for the last"
        )
    which = at.which or 0
    if not -len(starts) <= which < len(starts):
        raise OutOfRange(
            f"{at!r} was asked for, and it occurs {len(starts)} times in {shorten(text)!r}"
        )
    return starts[which]


def placeholder_ids(lm: LM, *parts: TextPart) -> set[int]:
    """Returns the token ids that stand for images and videos or for sound (default: for both)."""
    names = chain.from_iterable(PLACEHOLDERS[part] for part in parts or PLACEHOLDERS)
    ids = {getattr(lm.config, name, None) for name in names}
    return {token_id for token_id in ids if isinstance(token_id, int)}
