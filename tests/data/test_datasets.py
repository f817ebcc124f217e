"""hk.datasets: pairs of prompts made for a tokenizer, and what a model says after them."""

import dataclasses
import hashlib
import itertools
import re

import by_hand
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import hookkit as hk
from hookkit.data.datasets import tasks
from hookkit.errors import (
    BadArgument,
    BadPrompt,
    EmptySelection,
    NotOneToken,
    OutOfRange,
    TooFew,
    UnknownKeyword,
    Unsupported,
)

D = hk.datasets
TEXTS = {
    make.__name__: make
    for make in (D.indirect_object, D.greater_than, D.successor, D.capitals, D.landmarks)
}
ALL = {**TEXTS, "induction": D.induction}
COLUMNS = [
    "row", "answer_token", "wrong_token", "logit_answer_clean", "logit_wrong_clean", "logit_diff_clean", "rank_clean",
    "logit_answer_corrupted", "logit_wrong_corrupted", "logit_diff_corrupted", "rank_corrupted", "right", "is_top1",
]  # fmt: skip


def trained(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer to which each of these words is one token, and two digits are; prompts begin with <s>."""
    made = Tokenizer(models.BPE())
    pairs_of_digits = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pairs_of_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    texts = [f" {word}" for word in words.replace(";", " ").split()] + [
        f"{number:02}" for number in range(100)
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(texts * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def random_model(tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    return hk.tiny("llama", tokenizer=tokenizer, config={"vocab_size": len(tokenizer)})


@pytest.fixture(scope="module")
def wordy() -> hk.LM:
    """A small random model, with a tokenizer of its own that knows every word."""
    lists = [
        tasks.NAMES,
        tasks.CAPITALS,
        tasks.LANDMARKS,
        *tasks.ROUND.values(),
        *tasks.STRAIGHT.values(),
    ]
    return random_model(trained(" ".join([*lists, "to The of gave"])))


@pytest.fixture(params=["the default tokenizer", "one that begins with <s>"])
def either(request, smol, wordy) -> hk.LM:
    return smol if request.param == "the default tokenizer" else wordy


def ids(lm: hk.LM, prompt: str | tuple[int, ...]) -> list[int]:
    return lm.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)


def word(lm: hk.LM, row: list[int], place: int) -> str:
    return lm.tokenizer.decode([row[place]])


def rows_of(pairs: hk.types.Pairs, lm: hk.LM):
    """Pair by pair: the tokens of both prompts, both answers, and the labels."""
    for number in range(len(pairs)):
        labels = {name: places[number] for name, places in pairs.labels.items()}
        yield (
            ids(lm, pairs.clean[number]), ids(lm, pairs.corrupted[number]), pairs.answers[number], pairs.wrong[number],
            labels,
        )  # fmt: skip


def differing(one: list[int], other: list[int]) -> list[int]:
    return [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


# ---- what every dataset promises


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_pairs_and_another_seed_gives_others(either, name):
    make = ALL[name]
    assert make(either, 20, seed=3) == make(either, 20, seed=3)
    assert make(either, 20, seed=3).clean != make(either, 20, seed=4).clean


@pytest.mark.parametrize("name", ALL)
def test_asking_for_more_pairs_keeps_the_first_ones(either, name):
    assert ALL[name](either, 30)[:10] == ALL[name](either, 10)


def test_the_pairs_of_a_seed_stay_the_same_from_machine_to_machine(smol):
    made = [make(smol, 40, seed=1) for make in ALL.values()]
    fields = [
        [tuple(each) for each in (p.clean, p.corrupted, p.answers, p.wrong)] + [{**p.labels}]
        for p in made
    ]
    said = repr([tuple(each) for each in fields])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "56a3ac2785a76729"


@pytest.mark.parametrize("name", ALL)
def test_clean_and_corrupted_prompts_are_equally_long_and_no_two_pairs_are_the_same(either, name):
    pairs = ALL[name](either, 60)
    assert len(pairs) == 60 == len({*zip(pairs.clean, pairs.corrupted, strict=True)})
    for clean, corrupted, _, _, labels in rows_of(pairs, either):
        assert len(clean) == len(corrupted) and clean != corrupted
        assert labels["end"] == len(clean) - 1
        assert all(0 < place < len(clean) for place in labels.values())


@pytest.mark.parametrize("name", TEXTS)
def test_both_answers_are_one_token_that_follows_either_prompt(either, name):
    pairs = TEXTS[name](either, 30)
    for number, (clean, corrupted, answer, wrong, _) in enumerate(rows_of(pairs, either)):
        for text, row in ((pairs.clean[number], clean), (pairs.corrupted[number], corrupted)):
            for token in (answer, wrong):
                after = ids(either, text + token)
                assert after[:-1] == row and word(either, after, -1) == token
        assert answer != wrong


@pytest.mark.parametrize("name", TEXTS)
def test_with_same_length_all_prompts_have_the_commonest_length(either, name):
    lengths = [len(ids(either, prompt)) for prompt in TEXTS[name](either, 100).clean]
    same = TEXTS[name](either, 30, same_length=True)
    found = {len(ids(either, prompt)) for prompt in same.clean}
    assert len(same) == 30 and len(found) == 1
    assert lengths.count(*found) == max(map(lengths.count, lengths))


# ---- what the labels point at, and what the corrupted prompts change


def test_the_labels_of_indirect_objects_stand_at_the_names(either):
    for clean, corrupted, answer, wrong, at in rows_of(D.indirect_object(either, 80), either):
        assert [word(either, clean, at[label]) for label in ("IO", "S1", "S2")] == [
            answer,
            wrong,
            wrong,
        ]
        assert at["S1"] < at["S2"] and at["IO"] < at["S2"] and at["S1+1"] == at["S1"] + 1
        assert word(either, clean, at["end"]) == " to"
        assert clean.count(clean[at["IO"]]) == 1 and clean.count(clean[at["S1"]]) == 2
        assert differing(clean, corrupted) == [at["S2"]]
        assert word(either, corrupted, at["S2"]) == answer


def test_three_other_names_stand_in_a_prompt_that_was_corrupted_with_abc(either):
    pairs = D.indirect_object(either, 40, corrupt="abc")
    assert pairs.clean == D.indirect_object(either, 40).clean
    for clean, corrupted, answer, wrong, at in rows_of(pairs, either):
        places = sorted([at["IO"], at["S1"], at["S2"]])
        assert differing(clean, corrupted) == places
        assert len({word(either, corrupted, place) for place in places} | {answer, wrong}) == 5


def test_indirect_objects_come_first_and_second_in_every_template(smol):
    pairs = D.indirect_object(smol, 600)
    orders = [at["IO"] < at["S1"] for *_, at in rows_of(pairs, smol)]
    assert 240 < sum(orders) < 360
    starts = {template.split("{first}")[0] for template in tasks.SENTENCES}
    assert all(any(prompt.startswith(start) for prompt in pairs.clean) for start in starts)
    assert len({*pairs.answers}) > 80


def test_a_later_year_is_the_answer_and_an_earlier_one_is_wrong(either):
    digits = (
        1 if either.name.startswith("SmolLM2") else 2
    )  # what the tokenizer makes of a year behind its century
    for clean, corrupted, answer, wrong, at in rows_of(D.greater_than(either, 80), either):
        years_read = [
            re.findall(r"year (\d\d)(\d\d) to the year (\d\d)$", either.text(row))
            for row in (clean, corrupted)
        ]
        ((century, start, again),), ((_, other, _),) = years_read
        assert century == again and int(century) in tasks.CENTURIES
        assert len(answer) == len(wrong) == digits
        assert other[:digits] < wrong < start[:digits] < answer
        assert differing(clean, corrupted) == [at["decade"]]
        assert word(either, clean, at["decade"]) == start[:digits]


def test_the_answer_of_a_successor_comes_after_the_last_item(either):
    everything = [words.split() for words in (*tasks.ROUND.values(), *tasks.STRAIGHT.values())]
    seen = set()
    for clean, corrupted, answer, wrong, at in rows_of(D.successor(either, 120), either):
        for row, after in ((clean, answer), (corrupted, wrong)):
            items = [word(either, row, at[f"item {number}"]).strip() for number in range(1, 5)] + [
                after.strip()
            ]
            (home,) = [words for words in everything if items[0] in words]
            start = home.index(items[0])
            assert items == [home[(start + step) % len(home)] for step in range(5)]
            seen.add(home[0])
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["capitals", "landmarks"])
def test_the_answer_of_a_fact_is_the_city_of_its_subject(either, name):
    listed = tasks.CAPITALS if name == "capitals" else tasks.LANDMARKS
    cities = dict(entry.strip().rsplit(" ", 1) for entry in listed.split(";"))
    for clean, corrupted, answer, wrong, at in rows_of(TEXTS[name](either, 80), either):
        for row, city in ((clean, answer), (corrupted, wrong)):
            text = either.text(row)
            (subject,) = [each for each in cities if re.search(rf"\b{each}\b", text, re.IGNORECASE)]
            assert f" {cities[subject]}" == city
            assert either.text(row[: at["subject"] + 1]).lower().endswith(subject.lower())
        assert answer != wrong


@pytest.mark.parametrize("length", [2, 7, 20])
def test_an_induction_prompt_says_its_tokens_twice_and_the_answer_once(either, length):
    lead = [0] if either.tokenizer.bos_token == "<s>" else []
    for clean, corrupted, answer, wrong, at in rows_of(
        D.induction(either, 20, length=length), either
    ):
        block = clean[len(lead) : len(lead) + length]
        assert clean == [*lead, *block, *block[:-1]] and len({*block}) == length
        assert clean[at["A1"]] == clean[at["end"]] and at["B1"] == at["A1"] + 1
        assert (
            either.string(clean[at["B1"]]) == answer and either.string(corrupted[at["B1"]]) == wrong
        )
        assert differing(clean, corrupted) == [at["B1"]]
        assert not {*block} & {*either.tokenizer.all_special_ids}


def test_induction_needs_no_tokenizer():
    lm = hk.tiny("gpt2")
    pairs = D.induction(lm, 6, length=5)
    assert all(isinstance(token, int) for token in (*pairs.answers, *pairs.wrong))
    assert all(clean[4] == answer for clean, answer in zip(pairs.clean, pairs.answers, strict=True))
    table = pairs.check(lm)
    logits = by_hand.logits(lm.model, list(pairs.clean[0]))[0, -1]
    assert table["logit_answer_clean"][0] == pytest.approx(
        float(logits[pairs.answers[0]]), abs=1e-4
    )
    assert len(pairs.to_frame()) == 6


# ---- what a model says


def by_plain_transformers(
    lm: hk.LM, prompt: str | tuple[int, ...], answer: str, wrong: str
) -> list[float]:
    logits = by_hand.logits(lm.model, ids(lm, prompt))[0, -1]
    right, other = (
        lm.tokenizer.encode(token, add_special_tokens=False)[0] for token in (answer, wrong)
    )
    rank = 1 + int((logits > logits[right]).sum())
    return [float(logits[right]), float(logits[other]), float(logits[right] - logits[other]), rank]


@pytest.mark.parametrize("name", ALL)
def test_a_check_says_what_plain_transformers_says_of_each_prompt_alone(wordy, name):
    pairs = ALL[name](wordy, 40, seed=2)  # more than one forward's worth, of several lengths
    table = pairs.check(wordy)
    assert list(table.columns) == COLUMNS
    for number, row in [*enumerate(table.to_dict("records"))][::4]:
        for side in ("clean", "corrupted"):
            prompt = getattr(pairs, side)[number]
            expected = by_plain_transformers(
                wordy, prompt, pairs.answers[number], pairs.wrong[number]
            )
            found = [
                row[f"{column}_{side}"]
                for column in ("logit_answer", "logit_wrong", "logit_diff", "rank")
            ]
            assert found == pytest.approx(expected, abs=1e-4), (name, number, side)
        assert row["row"] == number and row["answer_token"] == pairs.answers[number]
        assert row["right"] == (row["logit_diff_clean"] > 0) and row["is_top1"] == (
            row["rank_clean"] == 1
        )


def test_the_default_model_gives_the_drink_to_the_other_one(smol):
    start = "When Mary and John went to the store, "
    pairs = hk.types.Pairs(
        "mine",
        [start + "John gave a drink to"],
        [start + "Mary gave a drink to"],
        [" Mary"],
        [" John"],
    )
    (row,) = pairs.check(smol).to_dict("records")
    assert row["logit_diff_clean"] == pytest.approx(6.12, abs=0.05) and row["is_top1"]
    assert row["logit_diff_corrupted"] == pytest.approx(-5.49, abs=0.05) and row["right"]


@pytest.mark.parametrize("name", ALL)
def test_the_default_model_solves_every_dataset(smol, name):
    assert ALL[name](smol, 8, seed=5).check(smol)["right"].mean() >= 0.75


def test_the_solved_pairs_are_those_that_the_model_gets_right(wordy):
    pairs = D.capitals(wordy, 40)
    right = pairs.check(wordy)["right"].tolist()
    assert 0 < sum(right) < 40  # a random model solves some by chance
    solved = pairs.solved(wordy)
    assert solved.clean == list(itertools.compress(pairs.clean, right))
    assert solved.labels["subject"] == tuple(itertools.compress(pairs.labels["subject"], right))
    assert solved.note == f"tiny llama solves {sum(right)} of 40 pairs, {40 - sum(right)} fell out"
    assert solved.note in repr(solved) and solved.check(wordy)["right"].all()


def test_that_no_pair_is_solved_is_an_error(wordy):
    pairs = D.capitals(wordy, 12)
    unsolved = pairs[[row for row, right in enumerate(pairs.check(wordy)["right"]) if not right]]
    with pytest.raises(
        EmptySelection,
        match=r"tiny llama solves none of the \d+ pairs of capitals: look at pairs.check",
    ):
        unsolved.solved(wordy)
    with pytest.raises(EmptySelection, match="solves none of the 12 pairs"):
        pairs.solved(wordy, top1=True)


# ---- pairs as values


def test_a_part_of_the_pairs_keeps_everything_of_each(smol):
    pairs = D.indirect_object(smol, 12)
    for part, rows in (
        (pairs[2:5], [2, 3, 4]),
        (pairs[-1], [11]),
        (pairs[[7, 0]], [7, 0]),
        (pairs[::6], [0, 6]),
    ):
        assert len(part) == len(rows)
        for row, kept in zip(rows, part, strict=True):
            assert (kept.clean, kept.corrupted) == ([pairs.clean[row]], [pairs.corrupted[row]])
            assert (kept.answers, kept.wrong) == ([pairs.answers[row]], [pairs.wrong[row]])
            assert kept.labels == {name: (places[row],) for name, places in pairs.labels.items()}


def test_pairs_cannot_be_changed_and_can_be_compared(smol):
    pairs = D.capitals(smol, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.seed = 1
    assert pairs == D.capitals(smol, 3) != pairs[:2]
    assert len({pairs, D.capitals(smol, 3)}) == 1
    assert repr(pairs).startswith("Pairs(capitals, 3 pairs, seed 0: 'On a map of Peru")


def test_a_frame_has_a_row_for_each_pair_and_a_column_for_each_label(smol):
    pairs = D.indirect_object(smol, 5)
    table = pairs.to_frame()
    assert list(table.columns) == [
        "row",
        "clean",
        "corrupted",
        "answer_token",
        "wrong_token",
        "IO",
        "S1",
        "S1+1",
        "S2",
        "end",
    ]
    assert list(table["clean"]) == pairs.clean and tuple(table["S2"]) == pairs.labels["S2"]
    assert table["answer_token"][0] == pairs.answers[0]


def test_pairs_go_into_a_forward_and_a_patch(wordy):
    pairs = D.indirect_object(wordy, 6)
    clean = hk.forward(wordy, list(pairs.clean), hk.capture("resid_post.1"))
    patched = hk.forward(
        wordy, list(pairs.corrupted), hk.patch("resid_post.1", clean), logits="last"
    )
    plain = hk.forward(wordy, list(pairs.clean), logits="last")
    assert torch.allclose(patched.logits, plain.logits, atol=1e-4)


# ---- what is refused


def test_a_pair_that_is_not_there_is_refused(smol):
    pairs = D.capitals(smol, 3)
    with pytest.raises(OutOfRange, match="pair 3 was asked for, and there are 3, 0 to 2"):
        pairs[3]
    with pytest.raises(OutOfRange, match="pair -4 was asked for"):
        pairs[[0, -4]]
    with pytest.raises(OutOfRange, match="a whole number, a slice or a list of numbers, not by"):
        pairs[[True, False, True]]
    with pytest.raises(EmptySelection, match="selects none of the 3 pairs"):
        pairs[3:]


def test_a_tokenizer_that_knows_too_few_words_is_refused(llama):
    with pytest.raises(
        TooFew,
        match=r"at least 5 names that are one token are needed, and this tokenizer has 2 of \d+ \(John, Mary\)",
    ):
        D.indirect_object(llama, 5)
    with pytest.raises(TooFew, match="at least 5 capitals that are one token are needed"):
        D.capitals(llama, 5)
    with pytest.raises(TooFew, match="at least 5 cities that are one token"):
        D.landmarks(llama, 5)
    with pytest.raises(TooFew, match="at least 5 days, months, letters, numbers and ordinals"):
        D.successor(llama, 5)


def test_more_pairs_than_there_are_is_refused_with_how_many_there_are():
    lm = random_model(trained(tasks.ROUND["days"]))
    assert len(D.successor(lm, 168)) == 7 * 6 * 4
    with pytest.raises(
        TooFew,
        match="successor: n=169 was asked for, and 168 pairs were found with this tokenizer: ask for at most 168",
    ):
        D.successor(lm, 169)
    with pytest.raises(
        TooFew,
        match=r"successor: n=169 was asked for, and \d+ pairs of \d+ tokens, the commonest length",
    ):
        D.successor(lm, 169, same_length=True)


def test_a_vocabulary_that_is_too_small_for_the_block_is_refused():
    with pytest.raises(
        TooFew, match="induction: n=1 was asked for, and 0 pairs were found.*give another model"
    ):
        D.induction(hk.tiny("llama", config={"vocab_size": 8}), 1, length=8)


@pytest.mark.parametrize("name", TEXTS)
def test_a_dataset_of_texts_needs_a_tokenizer(name):
    with pytest.raises(
        Unsupported,
        match=f"{name} writes texts, and this model came without a tokenizer: give hk.LM",
    ):
        TEXTS[name](hk.tiny("llama"), 5)


@pytest.mark.parametrize("name", ALL)
def test_numbers_that_cannot_be_meant_are_refused(smol, name):
    for n in (0, -1, 2.5, True):
        with pytest.raises(BadArgument if n in (2.5, True) else OutOfRange, match=f"n={n}"):
            ALL[name](smol, n)
    with pytest.raises(BadArgument, match="seed=None: give a whole number"):
        ALL[name](smol, 5, seed=None)
    with pytest.raises(
        UnknownKeyword, match=f"{name}\\(\\) has no keyword 'sed'; did you mean 'seed'"
    ):
        ALL[name](smol, 5, sed=1)


def test_a_way_to_corrupt_that_is_unknown_is_refused(smol):
    with pytest.raises(
        EmptySelection, match="corrupt='swop' is unknown; did you mean 'swap'. Say 'swap' or 'abc'"
    ):
        D.indirect_object(smol, 5, corrupt="swop")


def test_a_block_that_the_model_cannot_read_is_refused(wordy):
    with pytest.raises(OutOfRange, match="length=1: give how many tokens are repeated, at least 2"):
        D.induction(wordy, 5, length=1)
    with pytest.raises(
        BadPrompt, match="makes prompts of 130 tokens, and the model's context is 128"
    ):
        D.induction(wordy, 5, length=65)


@pytest.mark.parametrize("name", ["indirect_object", "successor", "capitals", "landmarks"])
def test_texts_that_were_made_for_another_tokenizer_are_refused(smol, wordy, name):
    again = rf"pair 0 has other tokens with this tokenizer.*make the pairs with this model, hk.datasets.{name}\(lm"
    with pytest.raises(BadPrompt, match=again):
        TEXTS[name](smol, 5).check(wordy)


def test_ids_that_were_drawn_for_another_tokenizer_are_refused():
    days, months = (random_model(trained(words)) for words in tasks.ROUND.values())
    refused = 0
    for pair in D.induction(days, 40, length=3):
        try:
            pair.check(months)
        except (BadPrompt, NotOneToken):
            refused += 1
        else:  # a token that both number the same
            assert months.string(pair.clean[0][pair.labels["B1"][0]]) == pair.answers[0]
    assert 0 < refused < 40


def test_your_own_pairs_have_to_be_equally_long_with_answers_of_one_token(smol):
    uneven = hk.types.Pairs(
        "mine",
        ["The capital of France is"],
        ["The capital of South Korea is"],
        [" Paris"],
        [" Seoul"],
    )
    with pytest.raises(
        BadPrompt, match="pair 0 is 5 tokens clean and 6 corrupted.*give two prompts of one length"
    ):
        uneven.check(smol)
    with pytest.raises(NotOneToken, match="' oat milk' is 2 tokens here"):
        hk.types.Pairs("mine", ["I like"], ["I hate"], [" oat milk"], [" tea"]).check(smol)


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(
        BadPrompt,
        match="the pairs do not match: 2 clean, 1 corrupted, 1 answers, 1 wrong. Give one of",
    ):
        hk.types.Pairs("mine", ["a", "b"], ["c"], [" d"], [" e"])
    with pytest.raises(BadPrompt, match=r"1 wrong, 2 labels\['S1'\]"):
        hk.types.Pairs("mine", ["a"], ["c"], [" d"], [" e"], labels={"S1": [1, 2]})
    with pytest.raises(
        BadPrompt, match="answers=' d' is one text: give one for each pair, in a list"
    ):
        hk.types.Pairs("mine", ["a"], ["c"], " d", [" e"])
    with pytest.raises(EmptySelection, match="there is no pair: give at least one"):
        hk.types.Pairs("mine", [], [], [], [])
