"""Greater-than: a span of years, whose end the model should put after its beginning."""

from functools import partial
from random import Random

from ..arguments import checks_arguments
from ..model import LM
from ..positions import at
from .drawing import Draw, Urn, check_numbers, needs_tokenizer, next_token
from .pairs import Pairs

TEMPLATE = "The {noun} lasted from the year {century}{year} to the year {century}"
NOUNS = """
    campaign conflict drought dynasty empire famine journey marriage project reign siege strike treaty trial voyage war
"""
CENTURIES = range(11, 18)


@checks_arguments
def greater_than(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Spans of years of which the end is missing; the answer begins a later year than the first, the wrong one an
    earlier one.

    Answers are what this tokenizer makes of a year behind its century: one digit where it reads digits one by one (the
    decade), as the default model's does; two where "1762" is "17" and "62". The four decades in play are all different:
    that of the corrupted prompt's year, that of `wrong`, that of the clean prompt's year and that of the answer,
    from early to late. So after the corrupted prompt both answers are later years, and the logit difference should
    fall, but need not turn round. Many years are right: ask for `right`, not for `top1`.

    Labels: decade (where the first year's last two digits begin, the one place where the two prompts differ), end.

    Source: Hanna et al. 2023, How does GPT-2 compute greater-than? (arXiv 2305.00586); there the corrupted year is 01,
    and all later and earlier years are summed.

    >>> pairs = datasets.greater_than(lm, 50)
    >>> pairs.clean[0]
    'The treaty lasted from the year 1746 to the year 17'
    >>> pairs.corrupted[0]
    'The treaty lasted from the year 1706 to the year 17'
    >>> pairs.answers[0], pairs.wrong[0]
    ('7', '3')
    """
    check_numbers(n, seed)
    needs_tokenizer(lm, "greater_than")
    return Urn("greater_than", lm, partial(_draw, lm), seed).pairs(n, same_length=same_length)


def _draw(lm: LM, source: Random) -> Draw | None:
    noun, century, unit = source.choice(NOUNS.split()), source.choice(CENTURIES), source.randrange(10)
    corrupted, wrong, clean, answer = sorted(source.sample(range(10), 4))  # decades
    first, second = (
        TEMPLATE.format(noun=noun, century=century, year=f"{decade}{unit}") for decade in (clean, corrupted)
    )
    answers = [next_token(lm, first, f"{decade}{unit}") for decade in (answer, wrong)]
    if None in answers:
        return None
    right, other = answers
    assert right is not None and other is not None
    return Draw(first, second, right, other, {"decade": at(f"{century}{clean}")})
