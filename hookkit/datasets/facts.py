"""Factual recall: a subject, and the model should say the city that belongs to it."""

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TypeAlias

from ..arguments import checks_arguments
from ..model import LM
from ..positions import at
from .drawing import Draw, Urn, check_numbers, needs_tokenizer, one_token
from .pairs import Pairs

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
    draw = partial(_draw, _known(lm, CAPITALS, "capitals"), OF_CAPITALS)
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
    draw = partial(_draw, _known(lm, LANDMARKS, "cities"), OF_LANDMARKS)
    return Urn("landmarks", lm, draw, seed).pairs(n, same_length=same_length)


def _known(lm: LM, facts: str, what: str) -> list[Fact]:
    """The facts of a list whose city is one token."""
    pairs = [tuple(fact.strip().rsplit(" ", 1)) for fact in facts.split(";")]
    cities = one_token(lm, list(dict.fromkeys(city for _, city in pairs)), what)
    return [(subject, city) for subject, city in pairs if city in cities]


def _draw(facts: Sequence[Fact], templates: Sequence[str], source: Random) -> Draw | None:
    template = source.choice(templates)
    (subject, city), (other, other_city) = source.sample(facts, 2)
    if city == other_city:
        return None
    clean, corrupted = (template.format(subject=name, Subject=name[0].upper() + name[1:]) for name in (subject, other))
    place = at(subject.removeprefix("the "), which=0)
    return Draw(clean, corrupted, f" {city}", f" {other_city}", {"subject": place})
