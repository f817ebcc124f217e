"""What code prints against what a page shows: the same words; numbers may differ by one in their last digit.

Processors add in different orders, so a number that is rounded for a page can fall on either side.
"""

import doctest
import re

NUMBER = re.compile(
    r"(?<![\w.])-?\d+\.\d+(?![\w.])"
)  # with a point: counts and ranks have to be the same


def same(shown: str, printed: str) -> bool:
    """Whether these are the same words, with numbers within one unit of the last digit that either of them has."""
    if _words(shown) != _words(printed):
        return False
    return all(
        _near(*pair) for pair in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    )


def _words(text: str) -> list[str]:
    return NUMBER.sub(" # ", text).split()


def _near(shown: str, printed: str) -> bool:
    digits = max(len(number.split(".")[1]) for number in (shown, printed))
    return abs(float(shown) - float(printed)) < 1.5 * 10**-digits


class Checker(doctest.OutputChecker):
    """Accepts what `same` does."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """Whether an example gave what stands there."""
        return super().check_output(want, got, optionflags) or (
            "..." not in want and same(want, got)
        )
