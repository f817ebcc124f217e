"""Indirect object identification: two names, one of them again, and the model should say the other one."""

from functools import partial
from random import Random

from ..arguments import checks_arguments
from ..errors import EmptySelection, did_you_mean
from ..model import LM
from ..positions import at
from .drawing import Behind, Draw, Urn, check_numbers, needs_tokenizer, one_token
from .pairs import Pairs

# {first} and {second} are the two names in either order, {subject} the one that comes again.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "Then, {first} and {second} went to the {place}. {subject} gave a {thing} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {subject} gave a {thing} to",
    "Then, {first} and {second} were working at the {place}. {subject} decided to give a {thing} to",
    "Then, {first} and {second} were thinking about going to the {place}. {subject} wanted to give a {thing} to",
    "Then, {first} and {second} had a long argument at the {place}, and afterwards {subject} said to",
    "When {first} and {second} got a {thing} at the {place}, {subject} decided to give it to",
    "When {first} and {second} got a {thing} at the {place}, {subject} decided to give the {thing} to",
    "While {first} and {second} were working at the {place}, {subject} gave a {thing} to",
    "While {first} and {second} were commuting to the {place}, {subject} gave a {thing} to",
    "Last week {first} and {second} met at the {place}, and {subject} handed a {thing} to",
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station", "park", "library")
THINGS = ("ring", "bone", "basketball", "computer", "necklace", "drink", "snack", "book", "letter", "key")
NAMES = """
    Aaron Adam Alan Alex Alice Amy Andrew Andy Ann Anna Anne Anthony Arthur Austin Ben Blake Bob Brandon Brian Carlos
    Carol Charles Christopher Claire Clara Connor Daniel David Diana Edward Elena Elizabeth Emily Emma Eric Eva Eve
    Frank George Grace Graham Harry Helen Henry Ian Jack Jacob Jake James Jamie Jane Jason Jennifer Jeremy Jessica Jim
    John Jonathan Jose Joseph Joshua Juan Julia Justin Karen Kate Kelly Kevin Kyle Laura Leon Lewis Lily Linda Lisa
    Louis Lucy Luke Maria Mark Martha Martin Mary Matthew Michael Michelle Nancy Oliver Patrick Paul Pedro Peter Philip
    Rachel Richard Robert Roger Russell Ruth Ryan Sam Sara Sarah Scott Sean Simon Sophie Stephen Steven Susan Thomas Tim
    Tom Tyler Victoria Walter William
"""
CORRUPT = ("swap", "abc")


@checks_arguments
def indirect_object(lm: LM, n: int, *, seed: int = 0, corrupt: str = "swap", same_length: bool = False) -> Pairs:
    """Sentences in which one of two people gives something to the other; the answer is the other one's name.

    Half of them in expectation name the indirect object first (ABBA), half the subject (BABA). The answer is the
    indirect object, the wrong one the subject. The corrupted prompt with

    corrupt="swap"    is the same but for the second mention of the subject, where the other name stands: the one token
                      that differs turns the answer round, and `wrong` is right
    corrupt="abc"     has three other names, so that it says neither: the p_ABC of the paper

    Labels: IO (the indirect object), S1 and S2 (the subject's two mentions), S1+1 (what follows S1), end. In a swapped
    prompt the other name stands at S2. Names that are not one token of this tokenizer are left out; `TooFew` where
    fewer than 5 are left. `same_length=True` keeps to the commonest length in tokens, so that positions line up.

    Source: Wang et al. 2022, Interpretability in the Wild (arXiv 2211.00593), whose templates these follow.

    >>> pairs = datasets.indirect_object(lm, 50)
    >>> pairs.clean[0]
    'Then, Laura and Eve had a long argument at the house, and afterwards Laura said to'
    >>> pairs.corrupted[0]
    'Then, Laura and Eve had a long argument at the house, and afterwards Eve said to'
    >>> pairs.answers[0], pairs.wrong[0]
    (' Eve', ' Laura')
    """
    check_numbers(n, seed)
    needs_tokenizer(lm, "indirect_object")
    if corrupt not in CORRUPT:
        raise EmptySelection(f"corrupt={corrupt!r} is unknown{did_you_mean(corrupt, CORRUPT)} Say 'swap' or 'abc'")
    names = one_token(lm, NAMES.split(), "names")
    return Urn("indirect_object", lm, partial(_draw, names, corrupt), seed).pairs(n, same_length=same_length)


def _draw(names: list[str], corrupt: str, source: Random) -> Draw | None:
    template, place, thing = (source.choice(words) for words in (TEMPLATES, PLACES, THINGS))
    io, subject, *others = source.sample(names, 5)
    abba = source.random() < 0.5
    if io.startswith(subject) or subject.startswith(io):
        return None  # "Ann" would be found in "Anna"
    three = (io, subject, io) if corrupt == "swap" else others

    def sentence(io: str, subject: str, again: str) -> str:
        first, second = (io, subject) if abba else (subject, io)
        return template.format(first=first, second=second, subject=again, place=place, thing=thing)

    s1 = at(f" {subject}", which=0)
    return Draw(
        clean=sentence(io, subject, subject),
        corrupted=sentence(*three),
        answer=f" {io}",
        wrong=f" {subject}",
        labels={"IO": at(f" {io}"), "S1": s1, "S1+1": Behind(s1), "S2": at(f" {subject}", which=1)},
    )
