"""Factual recall: a subject, and the model should say the city that belongs to it.

Indirect object identification: two names, one of them again, and the model should say the other one.

Induction: random tokens, and the same again; the model should go on as it did the first time.

Successors: a run of days, months, letters, numbers or ordinals, and the model should say what comes next.

Greater-than: a span of years, whose end the model should put after its beginning.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random
from typing import TypeAlias

from ...arguments import checks_arguments, whole_number
from ...errors import BadPrompt, EmptySelection, did_you_mean
from ...models.lm import LM, Token
from ...models.positions import at
from .pairs import Pairs
from .templates import (
    Behind,
    Draw,
    Urn,
    check_numbers,
    is_token,
    needs_tokenizer,
    next_token,
    one_token,
    read,
)

Fact: TypeAlias = tuple[str, str]  # subject and city

OF_CAPITALS = (
    "The capital of {subject} is the city of",
    "The capital city of {subject} is",
    "In {subject}, the capital is the city of",
    "On a map of {subject}, the capital is the city of",
)
CAPITALS = """
    Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Armenia Yerevan; Australia Canberra;
    Austria Vienna; Bangladesh Dhaka; Belgium Brussels; Bulgaria Sofia; Canada Ottawa; Chile Santiago; China Beijing;
    Colombia Bogotá; Croatia Zagreb; Cuba Havana; Denmark Copenhagen; Ecuador Quito; Egypt Cairo; England London;
    Estonia Tallinn; Finland Helsinki; France Paris; Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens;
    Hungary Budapest; Iceland Reykjavik; Iran Tehran; Iraq Baghdad; Ireland Dublin; Italy Rome; Jamaica Kingston;
    Japan Tokyo; Jordan Amman; Kenya Nairobi; Latvia Riga; Lebanon Beirut; Libya Tripoli; Lithuania Vilnius;
    Malta Valletta; Mongolia Ulaanbaatar; Morocco Rabat; Mozambique Maputo; Namibia Windhoek; Nepal Kathmandu;
    the Netherlands Amsterdam; North Korea Pyongyang; Norway Oslo; Oman Muscat; Pakistan Islamabad; Peru Lima;
    the Philippines Manila; Poland Warsaw; Portugal Lisbon; Qatar Doha; Romania Bucharest; Russia Moscow; Rwanda Kigali;
    Saudi Arabia Riyadh; Scotland Edinburgh; Senegal Dakar; Serbia Belgrade; Slovakia Bratislava; Slovenia Ljubljana;
    Somalia Mogadishu; South Korea Seoul; Spain Madrid; Sudan Khartoum; Sweden Stockholm; Switzerland Bern;
    Syria Damascus; Thailand Bangkok; Turkey Ankara; Uganda Kampala; Venezuela Caracas; Vietnam Hanoi; Wales Cardiff;
    Zambia Lusaka; Zimbabwe Harare
"""
OF_LANDMARKS = (
    "{Subject} is located in the city of",
    "{Subject} is in the city of",
    "{Subject} is a famous landmark in the city of",
    "To see {subject}, tourists travel to the city of",
)
LANDMARKS = """
    the Eiffel Tower Paris; the Louvre Paris; the Arc de Triomphe Paris; the Champs-Élysées Paris; the Colosseum Rome;
    the Trevi Fountain Rome; the Brandenburg Gate Berlin; the Reichstag Berlin; Checkpoint Charlie Berlin;
    Big Ben London; Buckingham Palace London; Westminster Abbey London; Trafalgar Square London;
    Piccadilly Circus London; the British Museum London; the Kremlin Moscow; the Bolshoi Theatre Moscow;
    the Parthenon Athens; the Acropolis Athens; the Hagia Sophia Istanbul; the Blue Mosque Istanbul;
    the Topkapi Palace Istanbul; the Grand Bazaar Istanbul; the Forbidden City Beijing; the Summer Palace Beijing;
    the Oriental Pearl Tower Shanghai; the Meiji Shrine Tokyo; the Prado Museum Madrid; the Uffizi Gallery Florence;
    the Ponte Vecchio Florence; the Rialto Bridge Venice; the Rijksmuseum Amsterdam; the Anne Frank House Amsterdam;
    the Sagrada Familia Barcelona; Camp Nou Barcelona; the Schönbrunn Palace Vienna; the Hofburg Vienna;
    the Willis Tower Chicago; Wrigley Field Chicago; the Lincoln Memorial Washington; the Burj Khalifa Dubai;
    the Gateway of India Mumbai; the Red Fort Delhi; Tahrir Square Cairo; the CN Tower Toronto;
    the Motown Museum Detroit
"""


@checks_arguments
def capitals(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Sentences about a country's capital; the answer is the capital.

    The corrupted prompt names another country with as many tokens, and `wrong` is its capital. Capitals that are not
    one token of this tokenizer are left out; so are, for all, countries whose capital has two words or their own name.

    Labels: subject (the country's last token), end.

    Source: the task of Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262).

    >>> datasets.capitals(lm, 50)
    Pairs(capitals, 50 pairs, seed 0: 'On a map of Peru, the capital is the city of' → ' Lima', not ' Vienna')
    """
    check_numbers(n, seed)
    needs_tokenizer(lm, "capitals")
    draw = partial(_draw_fact, _known(lm, CAPITALS, "capitals"), OF_CAPITALS)
    return Urn("capitals", lm, draw, seed).pairs(n, same_length=same_length)


@checks_arguments
def landmarks(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Sentences about a building or a place that stands in one city; the answer is the city.

    The corrupted prompt names a landmark of another city with as many tokens, and `wrong` is that city. The landmarks
    were chosen among those that the default model, a small one, has heard of.

    Labels: subject (the landmark's last token), end.

    Source: the task of Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262).

    >>> datasets.landmarks(lm, 50)
    Pairs(landmarks, 50 pairs, seed 0: 'The Acropolis is in the city of' → ' Athens', not ' Berlin')
    """
    check_numbers(n, seed)
    needs_tokenizer(lm, "landmarks")
    draw = partial(_draw_fact, _known(lm, LANDMARKS, "cities"), OF_LANDMARKS)
    return Urn("landmarks", lm, draw, seed).pairs(n, same_length=same_length)


def _known(lm: LM, facts: str, what: str) -> list[Fact]:
    """The facts of a list whose city is one token."""
    pairs = [tuple(fact.strip().rsplit(" ", 1)) for fact in facts.split(";")]
    cities = one_token(lm, list(dict.fromkeys(city for _, city in pairs)), what)
    return [(subject, city) for subject, city in pairs if city in cities]


def _draw_fact(facts: Sequence[Fact], templates: Sequence[str], source: Random) -> Draw | None:
    template = source.choice(templates)
    (subject, city), (other, other_city) = source.sample(facts, 2)
    if city == other_city:
        return None
    clean, corrupted = (
        template.format(subject=name, Subject=name[0].upper() + name[1:])
        for name in (subject, other)
    )
    place = at(subject.removeprefix("the "), which=0)
    return Draw(clean, corrupted, f" {city}", f" {other_city}", {"subject": place})


# {first} and {second} are the two names in either order, {subject} the one that comes again.
SENTENCES = (
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
PLACES = (
    "store",
    "garden",
    "restaurant",
    "school",
    "hospital",
    "office",
    "house",
    "station",
    "park",
    "library",
)
THINGS = (
    "ring",
    "bone",
    "basketball",
    "computer",
    "necklace",
    "drink",
    "snack",
    "book",
    "letter",
    "key",
)
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
def indirect_object(
    lm: LM, n: int, *, seed: int = 0, corrupt: str = "swap", same_length: bool = False
) -> Pairs:
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
        raise EmptySelection(
            f"corrupt={corrupt!r} is unknown{did_you_mean(corrupt, CORRUPT)} Say 'swap' or 'abc'"
        )
    names = one_token(lm, NAMES.split(), "names")
    return Urn("indirect_object", lm, partial(_draw_sentence, names, corrupt), seed).pairs(
        n, same_length=same_length
    )


def _draw_sentence(names: list[str], corrupt: str, source: Random) -> Draw | None:
    template, place, thing = (source.choice(words) for words in (SENTENCES, PLACES, THINGS))
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


@checks_arguments
def induction(lm: LM, n: int, *, length: int = 20, seed: int = 0) -> Pairs:
    """`length` random tokens, then the same ones again up to the last but one; the answer is the last.

    Prompts are token ids, 2·length - 1 of them behind what the tokenizer begins a prompt with; the tokens are drawn
    uniformly from the vocabulary, special ones left out, and none comes twice in a block. The corrupted prompt has
    another token where the first block has the answer, and nothing else changed: `wrong` is that token, and is right.

    Works without a tokenizer: then answers are ids too. Labels: A1 (where the last token read stood the first time), B1
    (the answer, which followed it, and the one place where the prompts differ), end.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads (arXiv 2209.11895): [A][B] … [A] → [B].

    >>> pairs = datasets.induction(lm, 50, length=8)
    >>> len(pairs.clean[0])
    15
    >>> pairs.labels["B1"][0], lm.string(pairs.clean[0][7]) == pairs.answers[0]
    (7, True)
    """
    whole_number(length, "length", least=2, meaning="how many tokens are repeated,")
    lead = _lead(lm)
    if lm.context is not None and len(lead) + 2 * length - 1 > lm.context:
        raise BadPrompt(
            f"induction with length={length} makes prompts of {len(lead) + 2 * length - 1} tokens, and the model's "
            f"context is {lm.context}: give a smaller length"
        )
    return Urn("induction", lm, partial(_draw_repeat, lm, lead, length, _named(lm)), seed).pairs(n)


def _lead(lm: LM) -> tuple[int, ...]:
    """The tokens that the tokenizer begins every prompt with."""
    if lm.tokenizer is None:
        return ()
    whole, bare = read(lm, " a"), tuple(lm.encode(" a"))
    return whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else ()


def _named(lm: LM) -> Callable[[int], Token | None]:
    """A token as an answer names it: as text, or by its id without a tokenizer; None for one that cannot be named."""
    added = frozenset() if lm.tokenizer is None else frozenset(lm.tokenizer.added_tokens_decoder)

    @cache
    def named(token_id: int) -> Token | None:
        if lm.tokenizer is None:
            return token_id
        text = lm.string(token_id)
        return (
            text
            if token_id not in added and is_token(lm, text) and lm.token(text) == token_id
            else None
        )

    return named


def _draw_repeat(
    lm: LM, lead: tuple[int, ...], length: int, named: Callable[[int], Token | None], source: Random
) -> Draw | None:
    tried = source.sample(range(lm.n_tokens), min(lm.n_tokens, 4 * length + 4))
    drawn = [(token_id, name) for token_id in tried if (name := named(token_id)) is not None][
        : length + 1
    ]
    if len(drawn) <= length:
        return None
    (*block, answer), wrong = drawn[:length], drawn[length]
    same = tuple(token_id for token_id, _ in block)
    first = len(lead) + length - 1  # where the answer stands in the first block
    return Draw(
        clean=(*lead, *same, answer[0], *same),
        corrupted=(*lead, *same, wrong[0], *same),
        answer=answer[1],
        wrong=wrong[1],
        labels={"A1": first - 1, "B1": first},
    )


SERIES_TEMPLATES = (  # and what stands between the items
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
    usable = {
        name: series for name, series in all_series.items() if all(word in known for word in series)
    }
    return Urn("successor", lm, partial(_draw_series, usable), seed).pairs(
        n, same_length=same_length
    )


def _draw_series(usable: dict[str, list[str]], source: Random) -> Draw | None:
    if not usable:
        return None
    name = source.choice([*usable])
    template, between = source.choice(SERIES_TEMPLATES)
    series = usable[name]
    starts = range(len(series) if name in ROUND else len(series) - SHOWN)
    clean, corrupted = (
        [series[(start + step) % len(series)] for step in range(SHOWN + 1)]
        for start in source.sample(starts, 2)
    )
    first, second = (
        template.format(items=between.join(items[:SHOWN])) for items in (clean, corrupted)
    )
    labels = {
        f"item {number}": at(f" {word}", which=-1)
        for number, word in enumerate(clean[:SHOWN], start=1)
    }
    return Draw(first, second, f" {clean[SHOWN]}", f" {corrupted[SHOWN]}", labels)


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
    return Urn("greater_than", lm, partial(_draw_year, lm), seed).pairs(n, same_length=same_length)


def _draw_year(lm: LM, source: Random) -> Draw | None:
    noun, century, unit = (
        source.choice(NOUNS.split()),
        source.choice(CENTURIES),
        source.randrange(10),
    )
    corrupted, wrong, clean, answer = sorted(source.sample(range(10), 4))  # decades
    first, second = (
        TEMPLATE.format(noun=noun, century=century, year=f"{decade}{unit}")
        for decade in (clean, corrupted)
    )
    answers = [next_token(lm, first, f"{decade}{unit}") for decade in (answer, wrong)]
    if None in answers:
        return None
    right, other = answers
    assert right is not None and other is not None
    return Draw(first, second, right, other, {"decade": at(f"{century}{clean}")})
