"""Successors: a run of days, months, letters, numbers or ordinals, and the model should say what comes next."""

from functools import partial
from random import Random

from ..arguments import checks_arguments
from ..model import LM
from ..positions import at
from .drawing import Draw, Urn, check_numbers, needs_tokenizer, one_token
from .pairs import Pairs

TEMPLATES = (  # and what stands between the items
    ("In order: {items},", ", "),
    ("Say it in order: {items} and", " and "),
    ("We went through them in order: {items},", ", "),
    ("They come in this order: {items},", ", "),
)
ROUND = {  # series that begin again
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
}
STRAIGHT = {
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
}
SHOWN = 4  # items in a prompt


@checks_arguments
def successor(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Four days, months, letters, numbers or ordinals in order; the answer is the next one.

    The corrupted prompt has four others of the same series, and `wrong` is what comes after them. Days and months go
    round. A series is left out where one of its words is not one token of this tokenizer.

    Labels: item 1 to item 4, end.

    Source: Gould et al. 2023, Successor Heads (arXiv 2312.09230).

    >>> datasets.successor(lm, 50)
    Pairs(successor, 50 pairs, seed 0: 'They come in this order: one, two, three, four,' → ' five', not ' seven')
    """
    check_numbers(n, seed)
    needs_tokenizer(lm, "successor")
    all_series = {name: words.split() for name, words in {**ROUND, **STRAIGHT}.items()}
    words = [word for series in all_series.values() for word in series]
    known = one_token(lm, words, "days, months, letters, numbers and ordinals")
    usable = {name: series for name, series in all_series.items() if all(word in known for word in series)}
    return Urn("successor", lm, partial(_draw, usable), seed).pairs(n, same_length=same_length)


def _draw(usable: dict[str, list[str]], source: Random) -> Draw | None:
    if not usable:
        return None
    name = source.choice([*usable])
    template, between = source.choice(TEMPLATES)
    series = usable[name]
    starts = range(len(series) if name in ROUND else len(series) - SHOWN)
    clean, corrupted = (
        [series[(start + step) % len(series)] for step in range(SHOWN + 1)] for start in source.sample(starts, 2)
    )
    first, second = (template.format(items=between.join(items[:SHOWN])) for items in (clean, corrupted))
    labels = {f"item {number}": at(f" {word}", which=-1) for number, word in enumerate(clean[:SHOWN], start=1)}
    return Draw(first, second, f" {clean[SHOWN]}", f" {corrupted[SHOWN]}", labels)
