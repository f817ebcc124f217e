"""Tasks of the interpretability literature as prompt pairs, made for a model's tokenizer.

capitals, landmarks   factual recall: the city of a country or of a landmark
indirect_object       the name of the person who is mentioned once
induction             random tokens, repeated
successor             the next day, month, letter, number or ordinal
greater_than          a year after the beginning of a span
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from random import Random

from ...arguments import check_arguments, check_integer
from ...errors import BadPrompt, EmptySelection, did_you_mean
from ...models.lm import LM, Token
from ...models.positions import at
from .pairs import (
    Draw,
    DrawPair,
    Pairs,
    TokenAfter,
    check_draws,
    check_text_draws,
    is_one_token,
    next_token,
    one_token_words,
    sample_pairs,
    tokenize,
)

# ---- factual recall

OF_CAPITALS = (
    "The capital of {subject} is the city of",
    "The capital city of {subject} is",
    "In {subject}, the capital is the city of",
    "On a map of {subject}, the capital is the city of",
)
CAPITALS = """
    Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Armenia Yerevan;
    Australia Canberra; Austria Vienna; Bangladesh Dhaka; Belgium Brussels; Bulgaria Sofia;
    Canada Ottawa; Chile Santiago; China Beijing; Colombia Bogotá; Croatia Zagreb; Cuba Havana;
    Denmark Copenhagen; Ecuador Quito; Egypt Cairo; England London; Estonia Tallinn;
    Finland Helsinki; France Paris; Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens;
    Hungary Budapest; Iceland Reykjavik; Iran Tehran; Iraq Baghdad; Ireland Dublin; Italy Rome;
    Jamaica Kingston; Japan Tokyo; Jordan Amman; Kenya Nairobi; Latvia Riga; Lebanon Beirut;
    Libya Tripoli; Lithuania Vilnius; Malta Valletta; Mongolia Ulaanbaatar; Morocco Rabat;
    Mozambique Maputo; Namibia Windhoek; Nepal Kathmandu; the Netherlands Amsterdam;
    North Korea Pyongyang; Norway Oslo; Oman Muscat; Pakistan Islamabad; Peru Lima;
    the Philippines Manila; Poland Warsaw; Portugal Lisbon; Qatar Doha; Romania Bucharest;
    Russia Moscow; Rwanda Kigali; Saudi Arabia Riyadh; Scotland Edinburgh; Senegal Dakar;
    Serbia Belgrade; Slovakia Bratislava; Slovenia Ljubljana; Somalia Mogadishu; South Korea Seoul;
    Spain Madrid; Sudan Khartoum; Sweden Stockholm; Switzerland Bern; Syria Damascus;
    Thailand Bangkok; Turkey Ankara; Uganda Kampala; Venezuela Caracas; Vietnam Hanoi;
    Wales Cardiff; Zambia Lusaka; Zimbabwe Harare
"""
OF_LANDMARKS = (
    "{Subject} is located in the city of",
    "{Subject} is in the city of",
    "{Subject} is a famous landmark in the city of",
    "To see {subject}, tourists travel to the city of",
)
LANDMARKS = """
    the Eiffel Tower Paris; the Louvre Paris; the Arc de Triomphe Paris; the Champs-Élysées Paris;
    the Colosseum Rome; the Trevi Fountain Rome; the Brandenburg Gate Berlin; the Reichstag Berlin;
    Checkpoint Charlie Berlin; Big Ben London; Buckingham Palace London; Westminster Abbey London;
    Trafalgar Square London; Piccadilly Circus London; the British Museum London;
    the Kremlin Moscow; the Bolshoi Theatre Moscow; the Parthenon Athens; the Acropolis Athens;
    the Hagia Sophia Istanbul; the Blue Mosque Istanbul; the Topkapi Palace Istanbul;
    the Grand Bazaar Istanbul; the Forbidden City Beijing; the Summer Palace Beijing;
    the Oriental Pearl Tower Shanghai; the Meiji Shrine Tokyo; the Prado Museum Madrid;
    the Uffizi Gallery Florence; the Ponte Vecchio Florence; the Rialto Bridge Venice;
    the Rijksmuseum Amsterdam; the Anne Frank House Amsterdam; the Sagrada Familia Barcelona;
    Camp Nou Barcelona; the Schönbrunn Palace Vienna; the Hofburg Vienna; the Willis Tower Chicago;
    Wrigley Field Chicago; the Lincoln Memorial Washington; the Burj Khalifa Dubai;
    the Gateway of India Mumbai; the Red Fort Delhi; Tahrir Square Cairo; the CN Tower Toronto;
    the Motown Museum Detroit
"""


@check_arguments
def capitals(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Returns sentences about a country's capital; the answer is the capital.

    The corrupted prompt names another country with as many tokens, and `wrong` is its capital.
    Capitals that are not one token of this tokenizer are left out. Countries whose capital has two
    words or the country's own name are not in the dataset.

    Labels: subject (the country's last token), end.

    Source: the task of Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv
    2202.05262).

    >>> datasets.capitals(lm, 50)
    Pairs(capitals, 50 pairs, seed 0: 'On a map of Peru, the capital is the city of' → ' Lima',
    not ' Vienna')
      next: pairs.check(lm), pairs.metric(), pairs.to_frame()
    """
    check_text_draws(lm, "capitals", n, seed)
    draw = _fact_draw(lm, CAPITALS, "capitals", OF_CAPITALS)
    return sample_pairs("capitals", lm, draw, n, seed=seed, same_length=same_length)


@check_arguments
def landmarks(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Returns sentences about a landmark of a city; the answer is the city.

    The corrupted prompt names a landmark of another city with as many tokens, and `wrong` is that
    city. The default model, a small one, knows these landmarks.

    Labels: subject (the landmark's last token), end.

    Source: the task of Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv
    2202.05262).

    >>> datasets.landmarks(lm, 50)
    Pairs(landmarks, 50 pairs, seed 0: 'The Acropolis is in the city of' → ' Athens', not ' Berlin')
      next: pairs.check(lm), pairs.metric(), pairs.to_frame()
    """
    check_text_draws(lm, "landmarks", n, seed)
    draw = _fact_draw(lm, LANDMARKS, "cities", OF_LANDMARKS)
    return sample_pairs("landmarks", lm, draw, n, seed=seed, same_length=same_length)


def _fact_draw(lm: LM, facts: str, what: str, templates: Sequence[str]) -> DrawPair:
    """Returns a function that draws two facts whose cities are one token each."""
    pairs = [tuple(fact.strip().rsplit(" ", 1)) for fact in facts.split(";")]
    cities = list(dict.fromkeys(city for _, city in pairs))
    one_token_cities = one_token_words(lm, cities, what)
    usable = [(subject, city) for subject, city in pairs if city in one_token_cities]

    def draw(source: Random) -> Draw | None:
        template = source.choice(templates)
        (subject, city), (other_subject, other_city) = source.sample(usable, 2)
        if city == other_city:
            return None
        return Draw(
            clean=_fill_in(template, subject),
            corrupted=_fill_in(template, other_subject),
            answer=f" {city}",
            wrong=f" {other_city}",
            labels={"subject": at(subject.removeprefix("the "), which=0)},
        )

    return draw


def _fill_in(template: str, subject: str) -> str:
    return template.format(subject=subject, Subject=subject[0].upper() + subject[1:])


# ---- indirect object identification

# {first} and {second} are the two names in either order, {subject} is the name that is repeated.
SENTENCES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "Then, {first} and {second} went to the {place}. {subject} gave a {thing} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {subject} gave a {thing} to",
    "Then, {first} and {second} were working at the {place}. "
    "{subject} decided to give a {thing} to",
    "Then, {first} and {second} were thinking about going to the {place}. "
    "{subject} wanted to give a {thing} to",
    "Then, {first} and {second} had a long argument at the {place}, "
    "and afterwards {subject} said to",
    "When {first} and {second} got a {thing} at the {place}, {subject} decided to give it to",
    "When {first} and {second} got a {thing} at the {place}, "
    "{subject} decided to give the {thing} to",
    "While {first} and {second} were working at the {place}, {subject} gave a {thing} to",
    "While {first} and {second} were commuting to the {place}, {subject} gave a {thing} to",
    "Last week {first} and {second} met at the {place}, and {subject} handed a {thing} to",
)
PLACES = "store garden restaurant school hospital office house station park library"
THINGS = "ring bone basketball computer necklace drink snack book letter key"
NAMES = """
    Aaron Adam Alan Alex Alice Amy Andrew Andy Ann Anna Anne Anthony Arthur Austin Ben Blake Bob
    Brandon Brian Carlos Carol Charles Christopher Claire Clara Connor Daniel David Diana Edward
    Elena Elizabeth Emily Emma Eric Eva Eve Frank George Grace Graham Harry Helen Henry Ian Jack
    Jacob Jake James Jamie Jane Jason Jennifer Jeremy Jessica Jim John Jonathan Jose Joseph Joshua
    Juan Julia Justin Karen Kate Kelly Kevin Kyle Laura Leon Lewis Lily Linda Lisa Louis Lucy Luke
    Maria Mark Martha Martin Mary Matthew Michael Michelle Nancy Oliver Patrick Paul Pedro Peter
    Philip Rachel Richard Robert Roger Russell Ruth Ryan Sam Sara Sarah Scott Sean Simon Sophie
    Stephen Steven Susan Thomas Tim Tom Tyler Victoria Walter William
"""
CORRUPT = ("swap", "abc")


@check_arguments
def indirect_object(
    lm: LM, n: int, *, seed: int = 0, corrupt: str = "swap", same_length: bool = False
) -> Pairs:
    """Returns sentences in which a person gives something to another; the answer is the other's
    name.

    The indirect object is first (ABBA) or second (BABA) with equal probability. The answer is the
    indirect object, and `wrong` is the subject. The corrupted prompt:

    corrupt="swap"    has the indirect object at S2, so that `wrong` is the right answer to it
    corrupt="abc"     has three other names, so that neither is right: the p_ABC of the paper

    Labels: IO (the indirect object), S1 and S2 (the subject's two mentions), S1+1 (the token after
    S1), end. Names that are not one token of this tokenizer are left out. Raises `TooFew` if fewer
    than 5 names remain. `same_length=True` selects pairs of the commonest length in tokens, so that
    positions line up.

    Source: Wang et al. 2022, Interpretability in the Wild (arXiv 2211.00593), whose templates these
    follow.

    >>> pairs = datasets.indirect_object(lm, 50)
    >>> pairs.clean[0]
    'Then, Laura and Eve had a long argument at the house, and afterwards Laura said to'
    >>> pairs.corrupted[0]
    'Then, Laura and Eve had a long argument at the house, and afterwards Eve said to'
    >>> pairs.answers[0], pairs.wrong[0]
    (' Eve', ' Laura')
    """
    check_text_draws(lm, "indirect_object", n, seed)
    if corrupt not in CORRUPT:
        raise EmptySelection(
            f"corrupt={corrupt!r} is unknown{did_you_mean(corrupt, CORRUPT)} Say 'swap' or 'abc'"
        )
    draw = partial(_draw_sentence, one_token_words(lm, NAMES.split(), "names"), corrupt)
    return sample_pairs("indirect_object", lm, draw, n, seed=seed, same_length=same_length)


def _draw_sentence(names: list[str], corrupt: str, source: Random) -> Draw | None:
    template = source.choice(SENTENCES)
    location, thing = source.choice(PLACES.split()), source.choice(THINGS.split())
    io, subject, *other_names = source.sample(names, 5)
    is_abba = source.random() < 0.5
    if io.startswith(subject) or subject.startswith(io):
        return None  # `at` would match "Ann" in "Anna"

    def sentence(io: str, subject: str, repeated: str) -> str:
        first, second = (io, subject) if is_abba else (subject, io)
        return template.format(
            first=first, second=second, subject=repeated, place=location, thing=thing
        )

    s1, s2 = at(f" {subject}", which=0), at(f" {subject}", which=1)
    return Draw(
        clean=sentence(io, subject, subject),
        corrupted=sentence(io, subject, io) if corrupt == "swap" else sentence(*other_names),
        answer=f" {io}",
        wrong=f" {subject}",
        labels={"IO": at(f" {io}"), "S1": s1, "S1+1": TokenAfter(s1), "S2": s2},
    )


# ---- induction


@check_arguments
def induction(lm: LM, n: int, *, length: int = 20, seed: int = 0) -> Pairs:
    """Returns sequences of `length` random tokens that are repeated; the answer is the last token.

    Prompts are token ids: the tokens that the tokenizer adds, then 2·length - 1 ids. They are drawn
    uniformly from the vocabulary without special tokens, and no token occurs twice in a sequence.
    The corrupted prompt has another token instead of the answer in the first sequence: `wrong` is
    that token, and is the right answer to it.

    Works without a tokenizer; the answers are then ids. Labels: A1 (the first occurrence of the
    last token that is read), B1 (the answer after it, where the prompts differ), end.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads (arXiv 2209.11895): [A][B] …
    [A] → [B].

    >>> pairs = datasets.induction(lm, 50, length=8)
    >>> len(pairs.clean[0])
    15
    >>> pairs.labels["B1"][0], lm.string(pairs.clean[0][7]) == pairs.answers[0]
    (7, True)
    """
    check_draws(n, seed)
    check_integer(length, "length", least=2, meaning="how many tokens are repeated,")
    prefix = _added_prefix(lm)
    prompt_length = len(prefix) + 2 * length - 1
    if lm.context is not None and prompt_length > lm.context:
        raise BadPrompt(
            f"induction with length={length} makes prompts of {prompt_length} tokens, and the "
            f"model's context is {lm.context}: give a smaller length"
        )
    name_answer = _answer_namer(lm)

    def draw(source: Random) -> Draw | None:
        drawn = source.sample(range(lm.n_tokens), min(lm.n_tokens, 4 * length + 4))
        names = _names_of(name_answer, drawn)
        if len(names) <= length:
            return None
        *repeated, answer, wrong = list(names)[: length + 1]
        answer_position = len(prefix) + length - 1
        return Draw(
            clean=(*prefix, *repeated, answer, *repeated),
            corrupted=(*prefix, *repeated, wrong, *repeated),
            answer=names[answer],
            wrong=names[wrong],
            labels={"A1": answer_position - 1, "B1": answer_position},
        )

    return sample_pairs("induction", lm, draw, n, seed=seed)


def _names_of(
    name_answer: Callable[[int], Token | None], token_ids: Iterable[int]
) -> dict[int, Token]:
    """Returns the answers that name these tokens, without the tokens that have none."""
    names: dict[int, Token] = {}
    for token_id in token_ids:
        name = name_answer(token_id)
        if name is not None:
            names[token_id] = name
    return names


def _added_prefix(lm: LM) -> tuple[int, ...]:
    """Returns the tokens that the tokenizer adds before every prompt."""
    if lm.tokenizer is None:
        return ()
    prompt, text = tokenize(lm, " a"), tuple(lm.encode(" a"))
    n_added = len(prompt) - len(text)
    return prompt[:n_added] if prompt[n_added:] == text else ()


def _answer_namer(lm: LM) -> Callable[[int], Token | None]:
    """Returns a function from a token id to the answer that names it.

    The answer is the token's text, or its id without a tokenizer. It is None for tokens that have
    no such text.
    """
    if lm.tokenizer is None:
        return lambda token_id: token_id
    added_tokens = frozenset(lm.tokenizer.added_tokens_decoder)

    @cache
    def name_answer(token_id: int) -> Token | None:
        text = lm.string(token_id)
        if token_id in added_tokens or not is_one_token(lm, text) or lm.token(text) != token_id:
            return None
        return text

    return name_answer


# ---- successors

SERIES_TEMPLATES = (  # a template, and the separator of the items
    ("In order: {items},", ", "),
    ("Say it in order: {items} and", " and "),
    ("We went through them in order: {items},", ", "),
    ("They come in this order: {items},", ", "),
)
ROUND = {  # cyclic series
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June "
    "July August September October November December",
}
STRAIGHT = {
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
}
ITEMS = 4  # in a prompt


@check_arguments
def successor(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Returns four days, months, letters, numbers or ordinals in order; the answer is the next one.

    The corrupted prompt has four others of the same series, and `wrong` is the one after them. Days
    and months are cyclic. A series is left out if one of its words is not one token of this
    tokenizer.

    Labels: item 1 to item 4, end.

    Source: Gould et al. 2023, Successor Heads (arXiv 2312.09230).

    >>> datasets.successor(lm, 50)
    Pairs(successor, 50 pairs, seed 0: 'They come in this order: one, two, three, four,' → ' five',
    not ' seven')
      next: pairs.check(lm), pairs.metric(), pairs.to_frame()
    """
    check_text_draws(lm, "successor", n, seed)
    all_series = {name: words.split() for name, words in {**ROUND, **STRAIGHT}.items()}
    words = list(chain.from_iterable(all_series.values()))
    usable_words = set(one_token_words(lm, words, "days, months, letters, numbers and ordinals"))
    usable = {name: words for name, words in all_series.items() if usable_words.issuperset(words)}
    draw = partial(_draw_items, usable)
    return sample_pairs("successor", lm, draw, n, seed=seed, same_length=same_length)


def _draw_items(usable: Mapping[str, list[str]], source: Random) -> Draw | None:
    if not usable:
        return None
    name = source.choice([*usable])
    template, separator = source.choice(SERIES_TEMPLATES)
    series = usable[name]
    n_starts = len(series) if name in ROUND else len(series) - ITEMS
    clean_start, corrupted_start = source.sample(range(n_starts), 2)
    *clean, answer = _successive_items(series, clean_start)
    *corrupted, wrong = _successive_items(series, corrupted_start)
    return Draw(
        clean=template.format(items=separator.join(clean)),
        corrupted=template.format(items=separator.join(corrupted)),
        answer=f" {answer}",
        wrong=f" {wrong}",
        labels={f"item {n}": at(f" {word}", which=-1) for n, word in enumerate(clean, start=1)},
    )


def _successive_items(series: list[str], start: int) -> list[str]:
    """Returns the items of a prompt and the next one."""
    return [series[(start + step) % len(series)] for step in range(ITEMS + 1)]


# ---- greater-than

TEMPLATE = "The {noun} lasted from the year {century}{year} to the year {century}"
NOUNS = """
    campaign conflict drought dynasty empire famine journey marriage
    project reign siege strike treaty trial voyage war
"""
CENTURIES = range(11, 18)


@check_arguments
def greater_than(lm: LM, n: int, *, seed: int = 0, same_length: bool = False) -> Pairs:
    """Returns spans of years without the end; the answer begins a later year, and `wrong` an
    earlier one.

    Answers are the tokens of a year after its century: one digit (the decade) if the tokenizer
    reads single digits, as the default model's does, or two if "1762" is "17" and "62". The decades
    of the corrupted prompt's year, of `wrong`, of the clean prompt's year and of the answer are all
    different and in this order. After the corrupted prompt both answers are later years: the logit
    difference should fall, but need not become negative. Many years are right: use `right`, not
    `top1`.

    Labels: decade (the first of the year's last two digits, where the two prompts differ), end.

    Source: Hanna et al. 2023, How does GPT-2 compute greater-than? (arXiv 2305.00586). In the paper
    the corrupted year is 01, and all later and earlier years are summed.

    >>> pairs = datasets.greater_than(lm, 50)
    >>> pairs.clean[0]
    'The treaty lasted from the year 1746 to the year 17'
    >>> pairs.corrupted[0]
    'The treaty lasted from the year 1706 to the year 17'
    >>> pairs.answers[0], pairs.wrong[0]
    ('7', '3')
    """
    check_text_draws(lm, "greater_than", n, seed)
    draw = partial(_draw_years, lm)
    return sample_pairs("greater_than", lm, draw, n, seed=seed, same_length=same_length)


def _draw_years(lm: LM, source: Random) -> Draw | None:
    noun = source.choice(NOUNS.split())
    century = source.choice(CENTURIES)
    unit = source.randrange(10)
    decades = sorted(source.sample(range(10), 4))
    corrupted_year, wrong_year, clean_year, later_year = [f"{decade}{unit}" for decade in decades]
    clean = TEMPLATE.format(noun=noun, century=century, year=clean_year)
    corrupted = TEMPLATE.format(noun=noun, century=century, year=corrupted_year)
    answer = next_token(lm, clean, later_year)
    wrong = next_token(lm, clean, wrong_year)
    if answer is None or wrong is None:
        return None
    return Draw(clean, corrupted, answer, wrong, {"decade": at(f"{century}{clean_year[0]}")})
