"""The mistakes that a user can make, one class each, so that each can be caught by name.

Every message has three parts: what was asked, what is there, what to do. Each class also is the builtin
exception that Python itself would raise in its place, so `except IndexError` keeps its meaning.
"""

import difflib
from collections.abc import Iterable

from .display import printable_lines


class HookkitError(Exception):
    """The root of all of hookkit's errors. A message holds texts of files and of models: it is told so that a terminal
    shows them and does not obey them."""

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class UnknownSite(HookkitError, ValueError):
    """No model family has a site of this name, or the module tree has no such path."""


class MissingSite(HookkitError, ValueError):
    """The name is a site, but this model has none of it, for the reason that the message gives."""


class OutOfRange(HookkitError, IndexError):
    """A layer, head, row, position or step that the model or the text does not have."""


class EmptySelection(HookkitError, ValueError):
    """A selection that selects nothing."""


class UnknownKeyword(HookkitError, TypeError):
    """A keyword that the function does not take."""


class NotOneToken(HookkitError, ValueError):
    """A text where one token is meant that the tokenizer makes several of, or none; or an id outside the vocabulary."""


class BadPrompt(HookkitError, ValueError):
    """A prompt that the model cannot read: empty, too long for the context, or not text or ids."""


class TooFew(HookkitError, ValueError):
    """More pairs of a dataset were asked for than can be made with this tokenizer, or too few of its words fit."""


class BadHook(HookkitError, ValueError):
    """A hook whose values cannot work: a vector of the wrong size, a factor that is not a number."""


class BadArgument(BadHook, TypeError):
    """An argument that is missing, or a value of another kind than the function takes."""


class BadEdit(HookkitError, ValueError):
    """An edit that gave back something that cannot take the place of what it was given."""


class NeverFired(HookkitError, RuntimeError):
    """A hook whose wish took no effect, or not everywhere. `run` has what was computed all the same."""

    run: object = None


class NotCaptured(HookkitError, LookupError):
    """A value was asked for that the run did not keep."""


class Unsupported(HookkitError, RuntimeError):
    """A mode of the model in which the wish has no defined meaning, refused before the first token."""


class TooLittleMemory(HookkitError, MemoryError):
    """A forward of a sweep for which there is too little memory, though it was cut as small as can be."""


class HarvestChanged(HookkitError, ValueError):
    """A harvest that cannot go on: its folder was begun with other settings, with another model or on other texts."""


class DamagedHarvest(HookkitError, OSError):
    """A folder without a harvest, or with one of which a file is missing or is not as it was written."""


class OtherSettings(HookkitError, ValueError):
    """A result's folder that has results of another model, seed or settings."""


class OtherModel(HookkitError, ValueError):
    """A steering vector that was made with another model than the one it is to be used with."""


class OtherVocabulary(HookkitError, ValueError):
    """Two models that do not read the same tokens, so that what they say cannot be compared."""


class ModelNotFound(HookkitError, OSError):
    """No model of this name could be found or read."""


class DownloadFailed(HookkitError, OSError):
    """The default model could not be fetched, checked or kept."""


class MissingExtra(HookkitError, ImportError):
    """What was asked for needs a package that hookkit does not bring along; the message names the extra that does."""


class ActorLost(HookkitError, RuntimeError):
    """The processes of an engine that computed something ended, again and again."""


class BadFile(HookkitError, OSError):
    """A file or folder that was named and cannot be read, or not be written."""


class DroppedOut(HookkitError, UserWarning):
    """A warning: the model is in training mode with dropout, so numbers differ from call to call."""


class Interrupted(HookkitError, UserWarning):
    """A warning: Ctrl-C ended a sweep, and its table has the rows that were done."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'resid_post'?` with the nearest of `words`, or a full stop."""
    known = list(words)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    close = (
        close
        or [
            each
            for each in known
            if len(each) > 2 and (word.startswith(each) or each.startswith(word))
        ][:3]
    )
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
