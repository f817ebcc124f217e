"""The errors that hookkit raises, one class for each kind of mistake.

Every message says what was asked, what exists and what to do. Each class is also a subclass of the
builtin exception that Python itself would raise, so that `except IndexError` works as usual.
"""

import difflib
from collections.abc import Iterable

from .display import printable_lines


class HookkitError(Exception):
    """The base class of hookkit's errors.

    Messages can contain texts of files and of models: `str` escapes what a terminal would not
    print."""

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class UnknownSite(HookkitError, ValueError):
    """The site name or the module path does not exist."""


class MissingSite(HookkitError, ValueError):
    """This model does not have the site. The message gives the reason."""


class OutOfRange(HookkitError, IndexError):
    """The model or the text does not have this layer, head, row, position or step."""


class EmptySelection(HookkitError, ValueError):
    """A selection selects nothing."""


class UnknownKeyword(HookkitError, TypeError):
    """The function does not take this keyword."""


class NotOneToken(HookkitError, ValueError):
    """A text is not exactly one token, or an id is outside the vocabulary."""


class BadPrompt(HookkitError, ValueError):
    """The model cannot read the prompt: it is empty, too long, or not a text or ids."""


class TooFew(HookkitError, ValueError):
    """A dataset has fewer pairs or usable words with this tokenizer than needed."""


class BadHook(HookkitError, ValueError):
    """A hook has invalid values: a vector of the wrong size, a factor that is not a number."""


class BadArgument(BadHook, TypeError):
    """An argument is missing, or has a value of another kind than the function takes."""


class BadEdit(HookkitError, ValueError):
    """An edit returned a value that cannot replace the original."""


class NeverFired(HookkitError, RuntimeError):
    """A hook had no effect at some or all of its positions. `run` has what was computed."""

    run: object = None


class NotCaptured(HookkitError, LookupError):
    """The run did not capture this value."""


class Unsupported(HookkitError, RuntimeError):
    """The model or its mode does not support the request. Raised before the first token."""


class TooLittleMemory(HookkitError, MemoryError):
    """The memory is too small for a forward of a sweep, even with the smallest batch."""


class HarvestChanged(HookkitError, ValueError):
    """A harvest cannot continue: its folder has other settings, another model or other texts."""


class DamagedHarvest(HookkitError, OSError):
    """A folder has no harvest, or a file of it is missing or was changed."""


class OtherSettings(HookkitError, ValueError):
    """A result folder has results of another model, seed or settings."""


class OtherModel(HookkitError, ValueError):
    """A steering vector was made with another model."""


class OtherVocabulary(HookkitError, ValueError):
    """Two models have different vocabularies, so that their logits cannot be compared."""


class ModelNotFound(HookkitError, OSError):
    """The model does not exist or cannot be read."""


class DownloadFailed(HookkitError, OSError):
    """The default model could not be downloaded, verified or stored."""


class MissingExtra(HookkitError, ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


class ActorLost(HookkitError, RuntimeError):
    """The processes of an engine ended repeatedly."""


class EngineLost(HookkitError, RuntimeError):
    """The process of a served model ended, or was closed."""


class BadFile(HookkitError, OSError):
    """A file or folder cannot be read or written."""


class DroppedOut(HookkitError, UserWarning):
    """A warning: the model is in training mode with dropout, so numbers differ between calls."""


class IncompleteAttention(HookkitError, UserWarning):
    """A warning: the attention implementation in use leaves out a part of the model's attention."""


class Interrupted(HookkitError, UserWarning):
    """A warning: Ctrl-C ended a sweep, and its table has the rows that were done."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns the end of a message: `; did you mean 'resid_post'?`, or `.` if none is near."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if not close:
        prefixes = [other for other in words if other.startswith(word) or word.startswith(other)]
        close = [other for other in prefixes if len(other) > 2][:3]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."


def __dir__() -> list[str]:
    classes = [value for value in globals().values() if isinstance(value, type)]
    return [value.__name__ for value in classes if value.__module__ == __name__]
