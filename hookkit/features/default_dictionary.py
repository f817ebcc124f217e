"""The steps by which `hookkit dictionary` makes a dictionary from texts, and its default texts.

The steps: read the texts, and hold some of them out; harvest the site; train; measure the quality
on the held-out texts. Each continues after an interruption. The default text is a mixture of the
sets of `hk.datasets.labelled`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..data.datasets.labelled_texts import labelled, labelled_names
from ..data.harvest.texts import open_texts
from ..data.harvest.writing import harvest
from ..errors import BadFile, TooFew
from ..models.lm import LM
from .dictionary import Dictionary
from .training import QUALITY, train_dictionary

TEXTS_OF_SET = 150  # the most that are drawn from one set of labelled texts
LEAST_CHARACTERS = 40  # of a text: names and titles are shorter
SAME_BEGINNING = 60  # characters; two texts that begin with the same ones count as one
MAX_TEXTS = 7075  # of the mixture: 330,000 tokens, which one free core reads in 7 minutes
HELD_OUT = 0.04  # share of the texts
CONTEXT = 128  # tokens of a text that are read
SHARD_SIZE = 2**15  # tokens of a shard: what an interruption loses at most


def mixed_texts() -> list[str]:
    """Returns a mixture of all sets of labelled texts, without repetitions, in random order.

    It has as many texts of each set, so that news, reviews, questions, abstracts, chats and code
    all occur.
    """
    random = Random(0)
    beginnings: set[str] = set()
    texts: list[str] = []
    for name in labelled_names():
        new_texts: list[str] = []
        for text in map(str.strip, labelled(name)["text"]):
            beginning = text[:SAME_BEGINNING]
            if len(text) >= LEAST_CHARACTERS and beginning not in beginnings:
                beginnings.add(beginning)
                new_texts.append(text)
        texts += random.sample(new_texts, min(len(new_texts), TEXTS_OF_SET))
    random.shuffle(texts)
    return texts[:MAX_TEXTS]


def shuffled_texts(file: str) -> list[Any]:
    """Returns the texts of a file in random order, so that those held out are like the others."""
    texts = list(open_texts(file))
    Random(0).shuffle(texts)
    return texts


def make_dictionary(
    lm: LM,
    texts: Sequence[Any],
    site: str,
    out: Path,
    *,
    report: Callable[[str], object],
    progress: bool | None = None,
    **settings: Any,
) -> Dictionary:
    """Returns the dictionary that these texts give, and writes it and its quality to a folder.

    `report` is called with a message at each step. `settings` are those of `train_dictionary`.
    """
    if (out / QUALITY).is_file():
        raise BadFile(
            f"{str(out)!r} has a dictionary already: load it with hk.load_dictionary, or remove "
            "the folder to train again"
        )
    count = max(1, round(HELD_OUT * len(texts)))
    held_out, trained = texts[:count], texts[count:]
    if not trained:
        raise TooFew(f"{len(texts)} texts were given, and one is held out: give more")
    context = min(CONTEXT, lm.context or CONTEXT)
    report(
        f"step 1 of 2: the values at {site} of {len(trained)} texts, of {context} tokens at most"
    )
    values = harvest(
        lm,
        trained,
        site,
        out / "harvest",
        pos=slice(1, None),
        dtype="bfloat16",
        context=context,
        long="truncate",
        on_error="skip",
        shard_size=SHARD_SIZE,
        progress=progress is not False,
    )
    report(f"step 2 of 2: training on {len(values)} tokens, and the quality on {count} other texts")
    settings |= {"held_out": held_out, "progress": progress}
    dictionary = train_dictionary(lm, values, site, out=out, **settings)
    shutil.rmtree(out / "harvest")
    return dictionary
