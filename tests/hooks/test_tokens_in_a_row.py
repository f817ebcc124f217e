"""Phrases: where they begin, what is read to ban one, and where neither can be known."""

import math

import by_hand
import pytest
import torch
from conftest import PROMPTS, tiny
from test_logits import MODES, PLAIN, STEPS, by_transformers, rows_of, unedited, written

import hookkit as hk
from hookkit.errors import BadHook, NeverFired, NotOneToken, OutOfRange, Unsupported

ALWAYS = hk.when.entropy_above(-1.0)


def test_a_phrase_is_written_from_each_step_that_is_named(lm):
    rows = rows_of(lm)
    plain = written(lm, rows[:1])[0]
    assert written(lm, rows, hk.force(hk.word([7, 8, 9])))[1][:3] == [7, 8, 9]
    assert written(lm, rows, hk.force(hk.word([7, 8]), step=[0, 2, 4]))[2] == [7, 8, 7, 8, 7, 8]
    late = written(lm, rows[:1], hk.force(hk.word([7, 8]), step=4))[0]
    assert late == [*plain[:4], 7, 8]


def test_a_phrase_that_begins_wherever_a_condition_holds_is_finished_before_it_begins_again(lm):
    rows = rows_of(lm)
    assert written(lm, rows, hk.force(hk.word([7, 8, 9]), when=ALWAYS)) == [[7, 8, 9, 7, 8, 9]] * 3
    odd = hk.force(hk.word([7, 8]), when=lambda logits, here: here.steps % 3 == 1)
    plain = written(lm, rows[:1])[0]
    found = written(lm, rows[:1], odd)[0]
    assert found[0] == plain[0]
    assert found[1:3] + found[4:6] == [7, 8, 7, 8]


@pytest.mark.parametrize(
    "mode", ["greedy", "no cache", "chunks", "static cache", "three sequences"]
)
def test_rows_begin_a_phrase_each_at_its_own_step(lm, mode):
    """The first row begins at step 1, the second at step 2, the third at step 3."""
    rows, settings = rows_of(lm), MODES[mode]
    hook = hk.force(
        hk.word([7, 8, 9]),
        when=lambda logits, here: here.steps == torch.tensor(here.rows)[:, None] + 1,
    )

    def at(start):
        due = {start: 7, start + 1: 8, start + 2: 9}

        def edit(said, step, ids):
            if step in due:
                said[due[step]] = said.max() + 10
            return said

        return lambda: edit

    assert written(lm, rows, hook, **settings) == by_transformers(
        lm, rows, [at(1), at(2), at(3)], **settings
    )


def test_the_same_hook_begins_anew_in_the_next_text(lm):
    rows = rows_of(lm)
    hook = hk.force(hk.word([7, 8, 9]), when=ALWAYS)
    with hk.attach(lm, hook):
        for count in (2, 4):
            new = lm.model.generate(torch.tensor(rows[:1]), **PLAIN | {"max_new_tokens": count})
            assert new[0, len(rows[0]) :].tolist() == [7, 8, 9, 7][:count]


def test_a_forced_phrase_is_written_in_a_decoding_loop_of_ones_own(lm):
    ids = torch.tensor(rows_of(lm)[:1])
    for hook in (hk.force(hk.word([7, 8, 9])), hk.force(hk.word([7, 8, 9]), when=ALWAYS)):
        new, cache = [], None
        with hk.attach(lm, hook), torch.no_grad():
            for _ in range(3):
                output = lm.model(
                    ids if not new else torch.tensor([new[-1:]]),
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                new.append(int(output.logits[0, -1].argmax()))
        assert new == [7, 8, 9]


def test_a_row_that_ends_within_a_phrase_is_an_error_that_brings_the_run(lm):
    with pytest.raises(NeverFired, match=r"force\(word\(\[7, 1, 9\]\)\)") as caught:
        hk.generate(lm, PROMPTS[0], hk.force(hk.word([7, 1, 9])), **PLAIN | {"eos_token_id": 1})
    assert caught.value.run.lengths[0] == caught.value.run.prompt_lengths[0] + 2


# ---- what a ban reads


def next_token(lm, row):
    return int(by_hand.logits(lm.model, row)[0, -1].argmax())


@pytest.mark.parametrize("verb", ["forward", "generate", "beams"])
def test_a_ban_reads_the_tokens_of_the_prompt_whatever_the_padding(lm, verb):
    """In each row alone the phrase is banned that the row is about to complete; the others wait in vain."""
    rows = rows_of(lm)
    phrases = [[*row[-2:], next_token(lm, row)] for row in rows]
    hook = hk.ban(*map(hk.word, phrases))
    if verb == "forward":
        for last in ("all", "last"):  # padded on the right, and on the left
            run = hk.forward(lm, rows, hook, logits=last)
            for row, phrase in enumerate(phrases):
                said = run.logits[row, run.lengths[row] - 1 if last == "all" else 0]
                assert (said == -math.inf).nonzero().flatten().tolist() == [phrase[-1]]
        return
    settings = MODES["beams"] if verb == "beams" else {}
    found = written(lm, rows, hook, **settings)
    for row, (phrase, new) in enumerate(zip(phrases, found, strict=True)):
        assert new[0] != phrase[-1]
        assert written(lm, [rows[row]], hk.ban(hk.word(phrase)), **settings)[0][0] != phrase[-1]


def test_a_ban_in_the_middle_of_a_prompt_is_at_the_position_named(lm):
    rows = rows_of(lm)
    row = rows[0]
    run = hk.forward(lm, rows, hk.ban(hk.word([*row[2:5], 9]), pos=[3, 4], rows=0), logits="all")
    banned = (run.logits == -math.inf).nonzero().tolist()
    assert banned == [[0, 4, 9]]


def test_a_phrase_longer_than_the_text_is_not_banned_yet(lm):
    row = [5]
    run = hk.forward(lm, [row], hk.ban(hk.word([5, 5, 9])))
    assert not (run.logits == -math.inf).any()
    assert (
        int((hk.forward(lm, [[5, 5]], hk.ban(hk.word([5, 5, 9]))).logits == -math.inf).sum()) == 1
    )


def repeated(lm, rows, phrases):
    """What must not come, by hand: no phrase in prompt and text, but where the prompt has it already."""

    def edit(said, step, ids):
        for phrase in phrases:
            if len(ids) >= len(phrase) - 1 and ids[len(ids) - len(phrase) + 1 :] == phrase[:-1]:
                said[phrase[-1]] = -math.inf
        return said

    return [lambda: edit] * len(rows)


def test_every_beam_is_read_on_its_own(lm):
    """Each phrase is one that a beam would write, so beams go on from different tokens."""
    rows, beams = rows_of(lm), MODES["beams"]
    phrases = []
    for _ in range(6):
        new = by_transformers(lm, rows, repeated(lm, rows, phrases), **beams)
        phrases += [
            tokens[n : n + 2]
            for tokens in new
            for n in range(STEPS - 1)
            if tokens[n : n + 2] not in phrases
        ]
    new = by_transformers(lm, rows, repeated(lm, rows, phrases), **beams)
    assert new != by_transformers(lm, rows, [unedited] * 3, **beams)
    assert len(phrases) > 6
    for cache in (True, False):
        assert written(lm, rows, hk.ban(*map(hk.word, phrases)), **beams, use_cache=cache) == new


# ---- where the tokens are not known


def test_a_ban_in_a_decoding_loop_of_ones_own_is_refused_where_the_tokens_are_not_known(lm):
    ids = torch.tensor(rows_of(lm)[:1])
    last = int(ids[0, -1])
    with (
        pytest.raises(
            Unsupported,
            match=f"before position {ids.shape[1]} of row 0 are not known: hookkit did not see",
        ),
        hk.attach(lm, hk.ban(hk.word([last, 9]))),
        torch.no_grad(),
    ):
        output = lm.model(ids, use_cache=True)
        assert output.logits[0, -1, 9] == -math.inf, "in the prompt they are known"
        lm.model(torch.tensor([[3]]), past_key_values=output.past_key_values)


def test_a_ban_holds_where_a_loop_goes_on_from_what_generate_wrote(lm):
    """The cache tells that the text goes on, and the tokens that generate wrote are known."""
    ids = torch.tensor(rows_of(lm)[:1])
    plain = lm.model.generate(ids, **PLAIN, return_dict_in_generate=True)
    last = int(plain.sequences[0, -1])
    with torch.no_grad(), hk.attach(lm, hk.ban(hk.word([last, 9]))):
        written = lm.model.generate(ids, **PLAIN, return_dict_in_generate=True)
        assert written.sequences.tolist() == plain.sequences.tolist()
        after = lm.model(written.sequences[:, -1:], past_key_values=written.past_key_values).logits[
            0, -1
        ]
    with torch.no_grad():
        wanted = lm.model(plain.sequences).logits[0, -1]
    assert after[9] == -torch.inf
    others = [token for token in range(len(wanted)) if token != 9]
    assert torch.allclose(after[others], wanted[others], atol=1e-4)


@pytest.mark.parametrize("step", [None, 0, 2])
def test_a_ban_behind_a_prompt_of_embeddings_is_refused(lm, step):
    embeds = lm.model.get_input_embeddings()(torch.tensor(rows_of(lm)[:1])).detach()
    with (
        pytest.raises(Unsupported, match="are not known: .*or the prompt was given as embeddings"),
        hk.attach(lm, hk.ban(hk.word([115, 115]), step=step)),
    ):
        lm.model.generate(inputs_embeds=embeds, **PLAIN)


def test_a_phrase_of_one_token_is_banned_even_there(lm):
    embeds = lm.model.get_input_embeddings()(torch.tensor(rows_of(lm)[:1])).detach()
    token = next_token(lm, rows_of(lm)[0])
    with hk.attach(lm, hk.ban(hk.word([token]))):
        new = lm.model.generate(inputs_embeds=embeds, **PLAIN)
    assert token not in new[0].tolist()


# ---- as values, and refused


def test_a_phrase_is_a_value():
    assert hk.word(" a cup", exact=True) == hk.word(" a cup", exact=True)
    assert hk.word([7, 8]) == hk.word((7, 8)) != hk.word([8, 7])
    assert len({hk.word([7, " a"]), hk.word([7, " a"]), hk.word(" a", exact=True)}) == 2
    for each in (hk.word(" a cup", exact=True), hk.word([7, " a"])):
        assert eval(repr(each), {"word": hk.word}) == each


def test_tokens_and_text_in_a_phrase_are_read_by_the_model_at_hand(lm):
    ids = lm.tokenizer.encode(" a cup")
    assert hk.word(" a cup", exact=True).ids(lm) == ids
    assert hk.word([7, " milk"]).ids(lm) == [7, *lm.tokenizer.encode(" milk")]


@pytest.mark.parametrize("nothing", ["", [], ()])
def test_a_phrase_of_nothing_is_refused(nothing):
    with pytest.raises(BadHook, match=r"word\(\) has no token: give a text, or tokens"):
        hk.word(nothing)


def test_text_without_a_tokenizer_is_refused():
    lm = hk.LM(tiny("llama"))
    words = r"word\(' a cup', exact=True\) is text, and this model came without a tokenizer: give token ids"
    for hook in (hk.force(hk.word(" a cup", exact=True)), hk.ban(hk.word(" a cup", exact=True))):
        with pytest.raises(NotOneToken, match=words):
            hk.generate(lm, [[5, 6]], hook, **PLAIN)
    assert written(lm, [[5, 6]], hk.force(hk.word([7, 8])))[0][:2] == [7, 8]


def test_a_phrase_that_comes_again_too_soon_or_ends_too_late_is_refused_before_the_first_token(lm):
    calls = []
    mine = lm.model.register_forward_hook(lambda *_: calls.append(1))
    three = hk.word([7, 8, 9])
    try:
        with pytest.raises(
            BadHook, match="would begin again before it is written: 3 tokens are needed"
        ):
            hk.generate(lm, PROMPTS[0], hk.force(three, step=[1, 3]), **PLAIN)
        with pytest.raises(
            OutOfRange,
            match=f"means step {STEPS} of row 0, and at most {STEPS} tokens are generated",
        ):
            hk.generate(lm, PROMPTS[0], hk.force(three, step=[0, STEPS - 2]), **PLAIN)
        with pytest.raises(
            OutOfRange, match="means step 1 of row 0, and a forward of the prompt has step 0 only"
        ):
            hk.forward(lm, PROMPTS[0], hk.force(three))
    finally:
        mine.remove()
    assert not calls
    assert written(lm, rows_of(lm)[:1], hk.force(three, step=[0, 3]))[0] == [7, 8, 9, 7, 8, 9]


def test_a_phrase_that_waits_for_a_condition_is_refused_in_beams(lm):
    with pytest.raises(
        Unsupported, match="begins when a condition holds has no place in beam search"
    ):
        written(lm, rows_of(lm), hk.force(hk.word([7, 8]), when=ALWAYS), **MODES["beams"])
