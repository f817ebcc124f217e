"""The record of a generation, held against transformers' own logits and scores, and against a forward over the text."""

import itertools

import by_hand
import pytest
import torch
from conftest import PROMPTS
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
)

import hookkit as hk
from hookkit.errors import BadHook, NotOneToken, Unsupported

VOCAB = 320
ALL = hk.trace(top=VOCAB)
STEPS = 3
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TWO = PROMPTS[:2]
SAMPLED = {**GREEDY, "do_sample": True}
VECTOR = torch.linspace(-1, 1, 32)


def stages(run, what="logits"):
    """The whole record: of each stage, for each row and step, the values of all tokens by id."""
    found = {name: {} for name in ("model", "edited", "processed")}
    for decision in run.recorded.decisions:
        ids = decision.record.ids[decision.model_row]
        for name, stage in decision.record.stages.items():
            values = torch.full((VOCAB,), torch.nan)
            values[ids] = getattr(stage, what)[decision.model_row].float()
            assert not values.isnan().any(), "a token of the vocabulary is missing"
            found[name][decision.row, decision.step] = values
    return found.values()


def padded(lm, prompts):
    """Prompts in a batch, padded on the left by hand, with the end token where there is no pad token, as usual."""
    rows = [lm.tokenizer.encode(text) for text in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[lm.tokenizer.eos_token_id] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def plain(lm, prompts, settings, seed=0, **more):
    """What transformers does by itself, with all that it can tell of it."""
    ids, mask = padded(lm, prompts)
    torch.manual_seed(seed)
    told = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    return lm.model.generate(ids, attention_mask=mask, **settings, **more, **told)


def new_tokens(run):
    rows = zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    return [tokens[start:end] for tokens, start, end in rows]


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "sampled with rules": {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "prompt in chunks": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "beams that end": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [1, 30, 60, 90]},
    "rows that end": {
        "do_sample": True,
        "num_return_sequences": 3,
        "eos_token_id": list(range(1, 60)),
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_stage_model_is_a_forward_over_the_final_text(lm, way):
    run = hk.generate(lm, TWO, seed=1, trace=ALL, logits=False, **{**GREEDY, **way})
    said, _, _ = stages(run)
    for row, (tokens, start, end) in enumerate(
        zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    ):
        expected = by_hand.logits(lm.model, tokens[: end - 1])[0, start - 1 :]
        mine = torch.stack([said.pop((row, step)) for step in range(end - start)])
        assert (mine - expected).abs().max() < 1e-4
    assert not said, "there are steps that no row lived to see"
    table = hk.decisions(run)
    assert [list(part["token_id"]) for _, part in table.groupby("row")] == new_tokens(run)
    starts = [run.prompt_lengths[row] for row in table["row"]]
    assert [pos - start + 1 for pos, start in zip(table["pos"], starts, strict=True)] == list(
        table["step"]
    )


@pytest.mark.parametrize(
    "way",
    [{}, {"do_sample": True, "seed": 4}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_edits_inside_the_model_are_in_the_stage_model(llama, way):
    hook = hk.steer("resid_post.1", VECTOR, pos=hk.GENERATED, scale=2.0)
    run = hk.generate(llama, TWO, hook, trace=ALL, **{**GREEDY, **way})
    said, _, _ = stages(run)
    for row, (tokens, start, end) in enumerate(
        zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    ):
        expected = by_hand.edited_logits(
            llama.model,
            tokens[: end - 1],
            "resid_post",
            1,
            lambda x, start=start: x + 2.0 * VECTOR * (torch.arange(x.shape[1]) >= start)[:, None],
        )[0, start - 1 :]
        assert (
            torch.stack([said[row, step] for step in range(end - start)]) - expected
        ).abs().max() < 1e-4


def test_a_row_that_ends_has_its_own_steps_and_no_more(llama):
    hooks = [hk.force(1, step=2, rows=0), hk.force(1, step=0, rows=2), hk.ban(1, rows=1)]
    run = hk.generate(
        llama, PROMPTS, *hooks, trace=ALL, **{**GREEDY, "eos_token_id": 1, "max_new_tokens": 4}
    )
    table = hk.decisions(run)
    assert table.groupby("row")["step"].apply(list).tolist() == [[0, 1, 2], [0, 1, 2, 3], [0]]
    assert [int(table[table["row"] == row]["token_id"].iloc[-1]) for row in (0, 2)] == [1, 1]


def by_hand_edit(logits, step, row):
    """What the hooks of the next test mean, written down."""
    logits = logits.clone()
    if row == 0:
        logits[7] = -torch.inf
    if step >= 1:
        logits[9] += 3.0
    if step == 2 and row == 1:
        logits[11] = logits.max() + 10
    return logits


@pytest.mark.parametrize(
    "way", [{}, {"do_sample": True, "temperature": 0.5, "seed": 2}, {"num_beams": 3}], ids=str
)
def test_the_stage_edited_is_the_logits_as_they_were_edited(llama, way):
    hooks = [
        hk.ban(7, rows=0),
        hk.boost(9, by=3.0, step=slice(1, None)),
        hk.force(11, step=2, rows=1),
    ]
    run = hk.generate(llama, TWO, *hooks, trace=ALL, **{**GREEDY, **way})
    _, said, _ = stages(run)
    for row, (tokens, start, end) in enumerate(
        zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    ):
        model = by_hand.logits(llama.model, tokens[: end - 1])[0, start - 1 :]
        for step, logits in enumerate(model):
            expected = by_hand_edit(logits, step, row)
            assert torch.equal(said[row, step].isneginf(), expected.isneginf())
            assert torch.allclose(said[row, step], expected, atol=1e-4)
            assert torch.allclose(run.logits[row, step], expected, atol=1e-4)


RULES = {
    "greedy": {},
    "plain draws": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 0.6},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "typical_p": {"do_sample": True, "top_k": 0, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "top_k": 0, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "top_k": 0, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "min_new_tokens": {"do_sample": True, "eos_token_id": list(range(1, 60)), "min_new_tokens": 2},
}


@pytest.mark.parametrize("way", RULES.values(), ids=RULES)
def test_every_stage_is_what_transformers_tells_of_itself(llama, way):
    settings = {**GREEDY, **way}
    expected = plain(llama, TWO, settings, seed=5)
    run = hk.generate(llama, TWO, seed=5, trace=ALL, **settings)
    width = expected.sequences.shape[1] - len(expected.scores)
    assert new_tokens(run) == [
        row[:count].tolist()
        for row, count in zip(expected.sequences[:, width:], map(len, new_tokens(run)), strict=True)
    ]
    model, edited, processed = stages(run)
    assert len(model) == sum(map(len, new_tokens(run)))
    for row, step in model:
        assert torch.equal(model[row, step], expected.logits[step][row])
        assert torch.equal(edited[row, step], expected.logits[step][row])
        assert torch.equal(processed[row, step], expected.scores[step][row])


def test_the_scores_of_edited_logits_are_what_transformers_makes_of_them(llama):
    settings = {**SAMPLED, "temperature": 0.5, "top_k": 10}
    run = hk.generate(llama, TWO, hk.boost(9, by=5.0), hk.ban(7), seed=2, trace=ALL, **settings)
    edit = Edited(
        lambda scores: scores.index_add(1, torch.tensor([9]), torch.full((len(scores), 1), 5.0))
    )
    ban = Edited(lambda scores: scores.index_fill(1, torch.tensor([7]), -torch.inf))
    expected = plain(
        llama, TWO, settings, seed=2, logits_processor=LogitsProcessorList([edit, ban])
    )
    # transformers runs a user's processors before temperature and top_k, so these two do what the hooks do
    assert new_tokens(run) == expected.sequences[:, -STEPS:].tolist()
    for (row, step), scores in list(stages(run))[2].items():
        assert torch.allclose(scores, expected.scores[step][row], atol=1e-5)


class Edited(LogitsProcessor):
    """A user's own rule."""

    def __init__(self, edit):
        self.edit, self.seen = edit, []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        return self.edit(scores)


MODES = {
    **RULES,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "ending beams": WAYS["beams that end"],
}


@pytest.mark.parametrize("way", MODES.values(), ids=MODES)
def test_a_trace_changes_no_draw(llama, way):
    settings = {**GREEDY, **way}
    ids, mask = padded(llama, TWO)
    torch.manual_seed(8)
    expected = llama.model.generate(ids, attention_mask=mask, **settings)
    after = torch.rand(3)
    torch.manual_seed(8)
    run = hk.generate(
        llama, TWO, trace=hk.trace(top=3, watch=(5, 6)), return_dict_in_generate=True, **settings
    )
    assert torch.equal(run.output.sequences, expected)
    assert torch.equal(torch.rand(3), after), "the trace drew from torch's generator"


def test_probabilities_of_the_whole_vocabulary_sum_to_one(llama):
    run = hk.generate(llama, TWO, hk.ban(7), trace=ALL, seed=3, **SAMPLED, top_k=0, top_p=0.6)
    table = hk.candidates(run)
    sums = table.groupby(["row", "step", "stage"])["prob"].sum()
    assert len(sums) == len(TWO) * STEPS * 3
    assert (sums - 1).abs().max() < 1e-5
    assert torch.allclose(
        torch.tensor(table["logprob"].to_numpy()).exp(),
        torch.tensor(table["prob"].to_numpy()),
        atol=1e-7,
    )


def test_beams_are_scored_by_log_probabilities(llama):
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5}
    run = hk.generate(llama, PROMPTS[0], trace=ALL, **settings)
    expected = plain(llama, PROMPTS[:1], settings)
    _, edited, processed = stages(run)
    for row in range(2):
        assert run.tokens[row].tolist() == expected.sequences[row].tolist()
        beams = expected.beam_indices[row].tolist()
        for step in range(STEPS):
            assert torch.allclose(edited[row, step], expected.logits[step][beams[step]], atol=1e-4)
            assert torch.allclose(
                processed[row, step], expected.scores[step][beams[step]], atol=1e-4
            )


@pytest.mark.parametrize("family_of_ties", [(100, 300), (300, 100, 200)], ids=str)
def test_ranks_of_tokens_that_share_a_logit_are_equal(llama, family_of_ties):
    def share(logits, here):
        return logits.index_copy(
            -1,
            torch.tensor(family_of_ties),
            logits[..., [100]].expand(*logits.shape[:-1], len(family_of_ties)),
        )

    run = hk.generate(llama, PROMPTS[0], hk.edit("logits", share), trace=ALL, **GREEDY)
    for number, (logits, ranks) in enumerate(zip(stages(run), stages(run, "ranks"), strict=True)):
        for where, values in logits.items():
            ordered = sorted(values.tolist(), reverse=True)
            assert ranks[where].tolist() == [ordered.index(value) + 1 for value in values.tolist()]
        if number:
            assert all(
                len({int(ranks[where][token]) for token in family_of_ties}) == 1 for where in ranks
            )


# ---- what the user brings along


class After(StoppingCriteria):
    """Ends every row at its third token."""

    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.width + 3)


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "seed": 1, "temperature": 0.5}], ids=str)
def test_a_users_processor_sees_the_edited_logits_and_the_trace_sees_what_it_makes_of_them(
    llama, more
):
    mine = Edited(lambda scores: scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf))
    run = hk.generate(
        llama,
        TWO,
        hk.force(9, margin=10.0),
        logits_processor=[mine],
        trace=ALL,
        **{**GREEDY, **more},
    )
    _, edited, processed = stages(run)
    assert len(mine.seen) == STEPS
    for row, step in itertools.product(range(len(TWO)), range(STEPS)):
        assert int(edited[row, step].argmax()) == 9
        assert torch.equal(mine.seen[step][row], edited[row, step]), (
            "the edits act before the user's processors"
        )
        assert processed[row, step][9] == -torch.inf
    assert not any(9 in row for row in new_tokens(run))


def test_a_processor_that_writes_into_the_scores_leaves_the_earlier_stages_alone(llama):
    def downwards(scores):
        scores[:, 9] = -torch.inf
        return scores

    run = hk.generate(llama, TWO, logits_processor=[Edited(downwards)], trace=ALL, **GREEDY)
    model, edited, processed = stages(run)
    for row, step in model:
        assert torch.equal(model[row, step], run.logits[row, step])
        assert torch.equal(edited[row, step], run.logits[row, step])
        assert processed[row, step][9] == -torch.inf


def test_a_users_stopping_criterion_and_streamer_work_with_a_trace(llama):
    streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True)
    criterion = After(len(llama.tokenizer.encode(PROMPTS[0])))
    settings = {**GREEDY, "max_new_tokens": 8}
    run = hk.generate(
        llama,
        PROMPTS[0],
        hk.force(9, step=1),
        stopping_criteria=[criterion],
        streamer=streamer,
        trace=ALL,
        **settings,
    )
    assert list(hk.decisions(run)["step"]) == [0, 1, 2]
    assert hk.decisions(run)["token_id"][1] == 9
    assert "".join(streamer) == run.generated[0]


# ---- what it costs, and what is refused


def numbers(found, seen):
    """How many numbers the tensors in an object hold, each storage once, views counted with all that they keep alive."""
    if isinstance(found, torch.Tensor):
        storage = found.untyped_storage()
        count = 0 if storage.data_ptr() in seen else storage.nbytes() // found.element_size()
        seen.add(storage.data_ptr())
        return count
    if isinstance(found, dict):
        found = list(found.values())
    elif hasattr(type(found), "__slots__"):
        found = [getattr(found, name) for name in type(found).__slots__]
    return sum(numbers(each, seen) for each in found) if isinstance(found, list | tuple) else 0


def test_the_record_of_twenty_steps_is_smaller_than_two_vocabularies():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    wide = hk.LM(LlamaForCausalLM(LlamaConfig(vocab_size=5_000, **sizes)).eval())
    hooks = [hk.ban(70), hk.boost(90, by=2.0)]
    settings = {
        "max_new_tokens": 20,
        "do_sample": True,
        "temperature": 0.8,
        "eos_token_id": None,
        "seed": 0,
    }
    run = hk.generate(wide, [[5, 6, 7]], *hooks, logits=False, trace=hk.trace(top=3), **settings)
    steps = {id(decision.record): decision.record for decision in run.recorded.decisions}
    assert len(steps) == 20
    seen = set()
    held = sum(numbers(step, seen) for step in steps.values())
    assert 20 * 3 * 3 < held < 2 * 5_000


def test_beam_sampling_leaves_no_trace(llama):
    with pytest.raises(
        Unsupported,
        match=r"beam sampling draws among beams, and its draws leave no trace: leave trace= out, or do_sample",
    ):
        hk.generate(llama, PROMPTS[0], trace=ALL, **SAMPLED, num_beams=3)


def test_an_edit_before_the_models_own_logits_leaves_no_trace(llama):
    with pytest.raises(
        Unsupported,
        match=r"acts at lm_head, before the logits that a trace reads as the model's own: let it act at",
    ):
        hk.generate(llama, PROMPTS[0], hk.boost(5, by=1.0, site="lm_head"), trace=ALL, **GREEDY)
    assert (
        hk.generate(llama, PROMPTS[0], hk.boost(5, by=1.0, site="lm_head"), **GREEDY).recorded
        is None
    )


@pytest.mark.parametrize("top", [0, -1, True, 2.0, None])
def test_a_trace_of_no_token_is_refused(top):
    with pytest.raises(BadHook, match=rf"top={top!r}: give "):
        hk.trace(top=top)


def test_a_watched_text_that_is_not_one_token_is_refused_before_the_first_token(llama):
    with pytest.raises(NotOneToken, match=r"'a walrus' is \d+ tokens here"):
        hk.generate(llama, PROMPTS[0], trace=hk.trace(watch="a walrus"), max_new_tokens=1)


def test_one_watched_token_may_stand_alone():
    assert hk.trace(watch=" tea") == hk.trace(watch=[" tea"]) == hk.trace(top=5, watch=(" tea",))
    assert hk.trace(watch=7).watch == (7,)
