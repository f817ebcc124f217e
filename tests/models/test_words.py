# pyright: reportArgumentType=false, reportCallIssue=false
"""Words: their spellings, the tokens that complete them, and what each verb does with them."""

import json
import math
import re

import pytest
import torch
from conftest import tiny
from matplotlib.text import Text
from test_tokenizers import KINDS, lm_with

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, NotOneToken
from hookkit.models.words import WordEnds

WHOLE = r"(?<!\w)(?:tea|Tea|TEA)(?!\w)"


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def lm(request: pytest.FixtureRequest) -> hk.LM:
    return lm_with(KINDS[request.param]())


@pytest.fixture(scope="module")
def smol() -> hk.LM:
    return hk.load()


# ---- spellings


def test_the_spellings_are_the_cases_with_and_without_a_space():
    assert hk.word("coffee").texts == ("coffee", "Coffee", "COFFEE")
    assert hk.word("McDonald").texts == ("McDonald", "mcdonald", "Mcdonald", "MCDONALD")
    assert hk.word("tea", plural=True).texts == ("tea", "Tea", "TEA", "teas", "Teas", "TEAS")
    assert "mice" in hk.word("mouse", plural="mice").texts
    plurals = [hk.word(text, plural=True).texts[-3:][0] for text in ("city", "toy", "box", "dish")]
    assert plurals == ["cities", "toys", "boxes", "dishes"]
    assert hk.word(" a Cup", exact=True).texts == (" a Cup",)


def test_the_tokens_of_each_spelling_are_the_tokenizers(smol):
    spellings = hk.word("coffee").spellings(smol)
    assert list(spellings) == [" coffee", "coffee", " Coffee", "Coffee", " COFFEE", "COFFEE"]
    for text, pieces in spellings.items():
        assert pieces == [
            smol.tokenizer.decode([token]) for token in smol.tokenizer.encode(text)
        ], text
    assert "".join(hk.word("quokka").spellings(smol)[" quokka"]) == " quokka"


def test_the_bytes_of_all_tokens_are_the_bytes_of_a_text(lm, smol):
    for model in (lm, smol):
        for text in ("I like tea", "café — 咖啡 😀 tea.", "<x>"):
            ids = model.encode(text)
            if model.tokenizer.unk_token_id in ids and model.tokenizer.unk_token_id is not None:
                continue
            joined = b"".join(model.token_bytes[token] for token in ids).decode()
            assert joined.removeprefix(" ") == model.text(ids).removeprefix(" ")
        special = [token for token in model.tokenizer.all_special_ids if token < 4]
        assert {model.token_bytes[token] for token in special} == {b"\0"}


# ---- which tokens complete a word, by decoding every possible text


def completing(lm, ids, pattern, may_continue=False):
    """The tokens after which the decoded text has the word newly, tried one by one."""
    before = lm.text(ids)
    texts = lm.tokenizer.batch_decode(
        [[*ids, token] for token in range(lm.n_tokens)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    found = set()
    for token, text in enumerate(texts):
        for match in re.finditer(pattern, text):
            if may_continue:
                is_new = match.end() < len(text) and match.end() >= len(before)
            else:
                is_new = match.end() > len(before)
            if is_new:
                found.add(token)
    return found


STARTS = (
    "I like",
    "I like tea",
    "I like te",
    "I like t",
    "tea",
    "The T",
    "s",
    "A te",
    "my tea.",
    "",
)


@pytest.mark.parametrize("start", STARTS)
def test_the_tokens_that_complete_a_word_are_those_after_which_the_text_has_it(lm, start):
    ids = lm.encode(start) if start else []
    if lm.tokenizer.unk_token_id in ids:
        ids = [token for token in ids if token != lm.tokenizer.unk_token_id]
    ends = WordEnds(lm, hk.word("tea"))
    assert set(ends.after(ids[-ends.n_read :])) == completing(lm, ids, WHOLE)


@pytest.mark.parametrize("start", STARTS)
def test_with_may_continue_they_are_those_with_which_the_word_ends(lm, start):
    ids = [token for token in lm.encode(start or "a") if token != lm.tokenizer.unk_token_id]
    ends = WordEnds(lm, hk.word("tea", may_continue=True))
    partial = {token for token in range(lm.n_tokens) if "�" in lm.text([token])}
    found = set(ends.after(ids[-ends.n_read :])) - partial
    assert found == completing(lm, ids, WHOLE, may_continue=True) - partial


@pytest.mark.parametrize("start", ["I like", "She drinks te", "Tea", "steam", "I te"])
def test_of_a_real_vocabulary_too(smol, start):
    ids = smol.encode(start)
    found = set(WordEnds(smol, hk.word("tea")).after(ids))
    assert found == completing(smol, ids, WHOLE)
    exact = set(WordEnds(smol, hk.word("tea", exact=True)).after(ids))
    assert exact == completing(smol, ids, "tea")
    assert smol.token(" teacher") not in found
    assert smol.token(" teacher") in exact


def test_words_that_begin_with_the_letters_stay_possible_as_the_tokenizer_spells_them(smol):
    ends = WordEnds(smol, hk.word("tea"))
    for text in (" teacher", " teapot", " teaspoon", " team", " tears", " teases", " steak"):
        ids = smol.encode(f"She has a{text} there")
        for end in range(1, len(ids)):
            assert ids[end] not in ends.after(ids[:end]), (text, smol.string(ids[end]))


def test_a_character_in_several_tokens_is_read_as_a_whole(smol):
    """ "кофе" is written letter by letter, "咖啡" byte by byte: the last byte completes it."""
    for text in ("кофе", "咖啡"):
        ids = smol.encode(f"I like {text}")
        ends = WordEnds(smol, hk.word(text))
        assert ids[-1] in ends.after(ids[:-1])
        assert ids[-2] not in ends.after(ids[:-2])
        inside = smol.encode(f"我喝{text}吧。")
        whole = smol.text(inside)
        banned = [n for n in range(len(inside)) if inside[n] in ends.after(inside[:n])]
        assert len(banned) == 1 and text in whole, "a script without spaces has words anywhere"
    patient = WordEnds(smol, hk.word("кофе", may_continue=True))
    ids = smol.encode("I like кофе")
    after = patient.after(ids)
    assert smol.token(".") in after and smol.tokenizer.eos_token_id in after
    letter = smol.encode("кофейня")[len(smol.encode("кофе"))]
    assert letter not in after
    dash = smol.encode("—")  # where it is several tokens, its last one ends the word
    written = [*ids]
    for number, token in enumerate(dash):
        assert (token in patient.after(written)) == (number == len(dash) - 1)
        written.append(token)


def test_accents_of_their_own_are_the_same_word(smol):
    decomposed = "cafe\u0301"
    ids = smol.encode(f" a {decomposed}")
    assert ids[-1] in WordEnds(smol, hk.word("café")).after(ids[:-1])
    assert WordEnds(smol, hk.word("cafe")).after(smol.encode(" a caf"))


# ---- what is written


def pieces(lm, texts):
    ids = [token for text in texts for token in lm.encode(text)]
    ids += [token for token in range(lm.n_tokens) if lm.string(token).strip() in ("t", "te", "ea")]
    ids += [token for token in range(lm.n_tokens) if lm.token_bytes[token] in (b"s", b"e", b"r")]
    ids = dict.fromkeys(token for token in ids if token not in lm.tokenizer.all_special_ids)
    return list(ids)


MODES = {
    "sampling": {"do_sample": True, "top_k": 0, "seed": 3},
    "no cache": {"do_sample": True, "top_k": 0, "seed": 3, "use_cache": False},
    "beams": {"num_beams": 4, "do_sample": False},
    "several": {"do_sample": True, "top_k": 0, "seed": 5, "num_return_sequences": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_banned_word_is_never_written_with_any_tokens(lm, mode):
    """Only the pieces of the word can be drawn, and rows of several lengths are padded."""
    prompts = ["I like oat milk", "te", "The answer is te"]
    tokens = pieces(lm, ["tea", " tea", "te", "a", "milk", "."])
    settings = {"max_new_tokens": 40, **MODES[mode]}
    only = hk.restrict(*tokens)
    free = hk.generate(lm, prompts, only, **settings)
    run = hk.generate(lm, prompts, hk.ban(hk.word("tea")), only, **settings)
    if mode != "beams":
        assert any(re.search(WHOLE, text) for text in free.text), free.text
    assert not any(re.search(WHOLE, text) for text in run.text)
    if mode != "beams":
        later = hk.ban(hk.word("tea", may_continue=True))
        run = hk.generate(lm, prompts, later, only, **settings)
        for text in run.text:
            assert not re.search(rf"{WHOLE}(?!$)", text)
        if lm.token_bytes[lm.encode("tea")[0]].strip() == b"tea":
            assert any("tea" in text for text in run.text), "it is begun, and goes on"


def test_by_default_a_ban_writes_something_else_at_once(smol):
    prompt, settings = "I like oat milk in my", {"max_new_tokens": 6, "do_sample": False}
    run = hk.generate(smol, prompt, hk.ban(hk.word("coffee")), **settings)
    token = hk.generate(smol, prompt, hk.ban(" coffee"), **settings)
    assert run.generated[0] == token.generated[0]
    with_more = hk.ban(hk.word("coffee", may_continue=True))
    run = hk.generate(smol, prompt, with_more, **settings)
    assert re.match(r" coffee\w", run.generated[0])
    logits = hk.forward(smol, prompt, hk.ban(hk.word("coffee"))).logits[0, -1]
    assert (logits == -math.inf).nonzero().flatten().tolist() == sorted(
        completing(smol, smol.encode(prompt), r"(?<!\w)(?:coffee|Coffee|COFFEE)(?!\w)")
    )


def test_force_writes_the_word_after_a_space(lm, smol):
    for model in (lm, smol):
        run = hk.generate(model, "I like", hk.force(hk.word("coffee")), max_new_tokens=8)
        assert " ".join(run.text[0].split()).startswith("I like coffee")
    assert hk.word("coffee").ids(smol) == [smol.token(" coffee")]
    assert hk.word("咖啡").ids(smol) == smol.encode("咖啡")


def test_boost_cap_and_restrict_mean_the_spellings_of_one_token(smol):
    prompt, word = "I like oat milk in my", hk.word("coffee")
    ids = [smol.token(text) for text in (" coffee", " Coffee")]
    plain = hk.forward(smol, prompt).logits[0, -1]
    boosted = hk.forward(smol, prompt, hk.boost(word, " tea", by=2.0)).logits[0, -1]
    changed = (boosted != plain).nonzero().flatten().tolist()
    assert changed == sorted([*ids, smol.token(" tea")])
    assert torch.allclose(boosted[changed], plain[changed] + 2.0)
    amounts = hk.forward(smol, prompt, hk.boost(by={word: 1.0, " tea": -3.0})).logits[0, -1]
    assert torch.allclose(amounts[ids], plain[ids] + 1.0)
    assert torch.allclose(amounts[smol.token(" tea")], plain[smol.token(" tea")] - 3.0)
    only = hk.forward(smol, prompt, hk.restrict(word)).logits[0, -1]
    assert (only > -math.inf).nonzero().flatten().tolist() == sorted(ids)
    capped = hk.forward(smol, prompt, hk.cap(word, prob=0.01)).logits[0, -1].softmax(-1)
    assert float(capped[ids].sum()) == pytest.approx(0.01, abs=1e-4)


def test_an_edit_of_words_can_be_written_as_one_of_tokens(smol):
    coffee, tea = [smol.token(text) for text in (" coffee", " Coffee")], smol.token(" tea")
    word, quokka = hk.word("coffee"), hk.word("quokka")
    row = hk.word(smol.encode(" quokka"))
    edits = {
        hk.ban(word, " tea"): hk.ban(*coffee, " tea"),
        hk.ban(quokka, step=0): hk.ban(row, step=0),
        hk.force(word, step=1): hk.force(coffee[0], step=1),
        hk.force(quokka): hk.force(row),
        hk.restrict(word): hk.restrict(*coffee),
        hk.boost(word, by=2.0): hk.boost(*coffee, by=2.0),
        hk.boost(by={word: 2.0, tea: -1.0}): hk.boost(
            by={coffee[0]: 2.0, coffee[1]: 2.0, tea: -1.0}
        ),
        hk.swap(" tea", " milk"): hk.swap(" tea", " milk"),
    }
    for edit, wanted in edits.items():
        assert edit.expanded(smol) == wanted


def test_watch_and_metrics_follow_the_spellings_of_one_token(smol):
    word, prompts = hk.word("coffee"), ["I like oat milk in my", "She drinks"]
    ids = [smol.token(text) for text in (" coffee", " Coffee")]
    run = hk.forward(smol, prompts)
    table = hk.ranks(run, top=0, watch=word)
    assert table["token_id"].tolist() == ids * 2 or sorted(table["token_id"]) == sorted(ids * 2)
    both = hk.ranks(run, top=0, watch=[word, " coffee", " tea"])
    assert len(both) == 6
    probs = torch.stack([run.logits[n, run.lengths[n] - 1].softmax(-1) for n in range(2)])
    assert torch.allclose(hk.metrics.prob(word)(run), probs[:, ids].sum(-1), atol=1e-6)
    assert torch.allclose(hk.metrics.logprob(word)(run), probs[:, ids].sum(-1).log(), atol=1e-4)
    assert (
        hk.metrics.rank(word)(run).tolist()
        == hk.metrics.rank([(" coffee", " Coffee")] * 2)(run).tolist()
    )
    assert hk.metrics.prob([word, " tea"])(run)[1] == pytest.approx(
        float(probs[1, smol.token(" tea")])
    )
    trace = hk.trace(top=1, watch=word)
    recorded = hk.generate(smol, prompts[0], trace=trace, max_new_tokens=2)
    assert set(ids) <= set(hk.candidates(recorded)["token_id"])


def test_figures_draw_the_spellings_that_a_table_has(smol):
    word, prompt = hk.word("coffee"), "I like oat milk in my"
    for figure in (hk.figures.logit_scatter, hk.figures.logit_panels):
        table = hk.ranks(hk.forward(smol, prompt), top=None)
        drawn = " ".join(text.get_text() for text in figure(table, watch=word).findobj(Text))
        assert "Coffee" in drawn and "coffee" in drawn
        with pytest.raises(EmptySelection, match=r"no spelling of word\('quokka'\)"):
            figure(table, watch=hk.word("quokka"))
    run = hk.generate(smol, prompt, trace=hk.trace(watch=word), max_new_tokens=3)
    figure = hk.figures.rank_lines(hk.candidates(run), watch=word)
    assert sum("offee" in text.get_text() for text in figure.findobj(Text)) >= 2


# ---- as a value, in JSON and in text


VALUES = [
    hk.ban(hk.word("coffee"), " tea"),
    hk.ban(hk.word("coffee", plural=True), hk.word("tea", may_continue=True), step=0),
    hk.ban(hk.word("mouse", plural="mice")),
    hk.boost(hk.word("coffee"), by=2.5),
    hk.boost(by={hk.word("coffee", plural=True): 2.0, " tea": -1.0}),
    hk.force(hk.word(" a cup, of tea", exact=True), step=3),
    hk.force(hk.word([7, " a"])),
    hk.restrict(hk.word("it's"), hk.word("кофе")),
]


@pytest.mark.parametrize("hook", VALUES, ids=map(str, VALUES))
def test_a_word_goes_through_json_and_the_short_text(hook):
    assert hk.types.Hook.from_json(hook.to_json()) == hook
    text = hk.format_hook(hook)
    assert not text.startswith("{") and hk.parse_hook(text) == hook
    names = {name: getattr(hk, name) for name in ("ban", "boost", "force", "restrict", "word")}
    assert eval(str(hook), names) == hook
    assert json.loads(hook.to_json())["hook"] == hook.verb


def test_the_short_form_of_a_word_is_word_colon():
    assert hk.parse_hook("ban:word:coffee") == hk.ban(hk.word("coffee"))
    assert hk.parse_hook("ban:word:oat milk, tea") == hk.ban(hk.word("oat milk"), " tea")
    assert hk.parse_hook("force:word:coffee@2") == hk.force(hk.word("coffee"), step=2)
    assert hk.parse_hook("boost:word:coffee=2") == hk.boost(hk.word("coffee"), by=2.0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hk.word(" coffee"), BadHook, "begins or ends with a space: give 'coffee'"),
        (lambda: hk.word("  "), BadHook, "no token"),
        (lambda: hk.word("tea", plural=3), BadHook, "regular English plural"),
        (lambda: hk.word("tea", exact="yes"), BadHook, "True or False"),
        (lambda: hk.word("tea", exact=True, plural=True), BadHook, "leave plural and may_continue"),
        (lambda: hk.word([7, 8], exact=True), BadHook, "exact already"),
        (lambda: hk.swap(hk.word("tea"), " coffee"), BadHook, "means one token: give the token"),
        (lambda: hk.set_rank(hk.word("tea"), 3), BadHook, "means one token"),
        (lambda: hk.metrics.logit_diff(hk.word("tea"), " a"), BadHook, "mean of their logits"),
        (lambda: hk.metrics.logit(hk.word("tea")), BadHook, "logprob, which adds"),
        (lambda: hk.when.rank_of(hk.word("tea"), at_most=3), NotOneToken, "several spellings"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_runs(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_word_without_a_spelling_of_one_token_is_refused_where_single_tokens_are_meant(smol):
    word = hk.word("quokka")
    for use in (
        lambda: hk.forward(smol, "A", hk.boost(word, by=2.0)),
        lambda: hk.ranks(hk.forward(smol, "A"), watch=word),
        lambda: hk.metrics.prob(word)(hk.forward(smol, "A")),
    ):
        with pytest.raises(NotOneToken, match=r"no spelling of one token here \(' qu' \+"):
            use()
    with pytest.raises(NotOneToken, match="without a tokenizer: give token ids"):
        hk.forward(hk.LM(tiny("llama")), [[5, 6]], hk.ban(hk.word("tea")))
