"""Sources that are read while a model runs, held against plain transformers: whole texts, row by row, without a cache."""

import copy
import json
from types import SimpleNamespace

import by_hand
import pytest
import torch
from conftest import PROMPTS, hooks_on
from programs import same_state, state_of
from tokenizers import Tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import hookkit as hk
from hookkit.errors import OtherVocabulary, Unsupported

STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True}
MODES = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "sampled with rules": {**SAMPLED, "temperature": 1.7, "top_k": 20, "top_p": 0.9},
    "several samples": {**SAMPLED, "num_return_sequences": 3},
    "beams": {**GREEDY, "num_beams": 3},
    "without a cache": {**GREEDY, "use_cache": False},
    "in chunks": {**GREEDY, "prefill_chunk_size": 4},
}
TWO = PROMPTS[:2]
OTHERS = ["We love", "The quick brown fox jumps over the lazy dog"]
VECTOR = torch.linspace(-1, 1, 32)


class Contrast(LogitsProcessor):
    """log p + by (log p_source - log p), where `source` returns logits after a row's new tokens."""

    def __init__(self, source, width, by, plausible=None):
        self.source, self.width, self.by, self.plausible = source, width, by, plausible

    def __call__(self, input_ids, scores):
        per_row = len(input_ids) // len(TWO)
        read = [
            self.source(number // per_row, row[self.width :].tolist())
            for number, row in enumerate(input_ids)
        ]
        own, other = scores.log_softmax(-1), torch.stack(read).log_softmax(-1)
        new = own + self.by * (other - own)
        if self.plausible:
            most = own.exp().amax(-1, keepdim=True)
            new = new.masked_fill(own.exp() < self.plausible * most, -torch.inf)
        return new.log_softmax(-1)


def last_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def by_definition(lm, source, by, settings, plausible=None, model=None):
    """The tokens of plain transformers with the definition as a logits processor."""
    rows = [lm.tokenizer.encode(text) for text in TWO]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(3)
    processor = Contrast(source, width, by, plausible)
    settings = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
    model = model or lm.model
    tokens = model.generate(ids, attention_mask=mask, logits_processor=[processor], **settings)
    return tokens[:, width:].tolist()


def new_tokens(run):
    rows = zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    return [tokens[start:end] for tokens, start, end in rows]


def after_prompts(lm, prompts):
    starts = [lm.tokenizer.encode(text) for text in prompts]
    return lambda row, new: last_logits(lm.model, starts[row % len(starts)] + new)


@pytest.mark.parametrize("mode", MODES)
def test_another_prompt_speaks_as_its_definition_says_in_every_decoding_mode(lm, mode):
    expected = by_definition(lm, after_prompts(lm, OTHERS), -1.5, MODES[mode])
    run = hk.generate(lm, TWO, hk.away_from(OTHERS, by=1.5), seed=3, **MODES[mode])
    assert new_tokens(run) == expected
    assert expected != by_definition(lm, after_prompts(lm, OTHERS), 0.0, MODES[mode])


@pytest.mark.parametrize("plausible", [None, 0.3])
def test_another_model_is_a_loop_of_two_models(lm, plausible):
    other = hk.LM(hk.tiny(lm.config.model_type, seed=7).model, lm.tokenizer, "other")
    before = state_of(other.model)
    rows = [lm.tokenizer.encode(text) for text in TWO]
    expected = by_definition(
        lm, lambda row, new: last_logits(other.model, rows[row] + new), 0.8, SAMPLED, plausible
    )
    edit = hk.toward(other, by=0.8, plausible=plausible)
    assert new_tokens(hk.generate(lm, TWO, edit, seed=3, **SAMPLED)) == expected
    assert same_state(other.model, before) == []


@pytest.mark.parametrize("by", [-1.0, 0.7])
def test_the_unedited_model_is_the_model_without_the_hooks_of_the_run(lm, by):
    edited, rows = copy.deepcopy(lm.model), [lm.tokenizer.encode(text) for text in TWO]
    module, _, _ = by_hand.module_of(edited, "resid_post", 1)
    module.register_forward_hook(lambda _m, _a, out: by_hand_added(out))
    expected = by_definition(
        lm, lambda row, new: last_logits(lm.model, rows[row] + new), by, SAMPLED, model=edited
    )
    hooks = hk.steer("resid_post.1", VECTOR), hk.toward(hk.UNEDITED, by=by)
    assert new_tokens(hk.generate(lm, TWO, *hooks, seed=3, **SAMPLED)) == expected


def by_hand_added(output):
    return (output[0] + VECTOR, *output[1:]) if isinstance(output, tuple) else output + VECTOR


def test_toward_the_unedited_model_by_one_undoes_edits_inside_the_model(lm):
    plain = hk.forward(lm, TWO).logits.log_softmax(-1)
    edits = hk.scale("pattern.1", 0.3), hk.steer("resid_post.0", VECTOR)
    undone = hk.forward(lm, TWO, *edits, hk.toward(hk.UNEDITED, by=1.0, pos=hk.PROMPT))
    for row, length in enumerate(undone.lengths):
        got = undone.logits[row, :length].log_softmax(-1)
        assert torch.allclose(got, plain[row, :length], atol=1e-4)


@pytest.mark.parametrize("site", ["resid_post.0", "resid_mid.2", "embed"])
def test_an_earlier_layer_is_read_as_dola_reads_it(lm, site):
    """The norm and the head of the model on the hidden state, by hand, at every step."""
    llama = lm.config.model_type == "llama"
    norm = lm.model.model.norm if llama else lm.model.transformer.ln_f
    rows = [lm.tokenizer.encode(text) for text in TWO]
    name, _, layer = site.partition(".")

    def source(row, new):
        state = by_hand.captured(lm.model, rows[row] + new, name, int(layer) if layer else None)
        with torch.no_grad():
            return lm.model.lm_head(norm(state[0, -1]))

    expected = by_definition(lm, source, -0.9, SAMPLED, plausible=0.1)
    edit = hk.away_from(hk.Site(name, int(layer) if layer else None), by=0.9, plausible=0.1)
    assert new_tokens(hk.generate(lm, TWO, edit, seed=3, **SAMPLED)) == expected


def test_a_tuned_lens_translates_the_layer(llama):
    lens = hk.train_lens(llama, [list(range(2, 200))], window=16, steps=2, progress=False)
    site = hk.Site("resid_post", 0)
    run = hk.forward(llama, TWO, hk.capture("resid_post.0", pos=-1))
    states = lens.translated(site, run["resid_post.0"][:, 0])
    with torch.no_grad():
        source = llama.model.lm_head(llama.model.model.norm(states)).log_softmax(-1)
    last = torch.tensor(run.lengths) - 1
    own = run.logits[[0, 1], last]
    edited = hk.forward(llama, TWO, hk.toward(site, by=0.5, lens=lens)).logits[[0, 1], last]
    assert torch.allclose(edited, own + 0.5 * (source - own.log_softmax(-1)), atol=1e-4)
    with pytest.raises(hk.errors.BadHook, match="not trained at resid_post.2"):
        hk.toward(hk.Site("resid_post", 2), by=0.5, lens=lens)


SOURCES = {
    "prompt": lambda lm: "We love",
    "prompts": lambda lm: OTHERS,
    "unedited": lambda lm: hk.UNEDITED,
    "model": lambda lm: hk.LM(hk.tiny(lm.config.model_type, seed=7).model, lm.tokenizer),
    "layer": lambda lm: hk.Site("resid_post", 1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_by_zero_is_bit_equal_to_no_source(lm, name):
    source = SOURCES[name](lm)
    steer = hk.steer("resid_post.1", VECTOR)
    plain = hk.generate(lm, TWO, steer, **GREEDY)
    run = hk.generate(lm, TWO, steer, hk.away_from(source, by=0.0), **GREEDY)
    assert torch.equal(run.logits, plain.logits) and run.generated == plain.generated
    assert torch.equal(
        hk.forward(lm, TWO, hk.toward(source, by=0)).logits, hk.forward(lm, TWO).logits
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_in_a_padded_batch_is_the_row_alone(lm, name):
    source = SOURCES[name](lm)
    edits = hk.steer("resid_post.1", VECTOR), hk.away_from(source, by=1.2)
    together = hk.generate(lm, TWO, *edits, **GREEDY)
    for row, prompt in enumerate(TWO):
        own = source[row] if isinstance(source, list) else source
        alone = hk.generate(lm, prompt, edits[0], hk.away_from(own, by=1.2), **GREEDY)
        assert torch.allclose(together.logits[row], alone.logits[0], atol=2e-4)
        again = hk.generate(lm, prompt, *edits[:1], hk.away_from(own, by=1.2), use_cache=False,
                            **GREEDY)  # fmt: skip
        assert torch.allclose(again.logits, alone.logits, atol=2e-4)


def test_two_rows_with_hooks_of_their_own_are_two_runs(lm):
    one, two = hk.away_from("We love", by=1.0, rows=0), hk.toward("Coffee in", by=0.5, rows=1)
    both = hk.generate(lm, TWO, one, two, **GREEDY)
    first = hk.generate(lm, TWO[0], hk.away_from("We love", by=1.0), **GREEDY)
    second = hk.generate(lm, TWO[1], hk.toward("Coffee in", by=0.5), **GREEDY)
    assert both.generated == [*first.generated, *second.generated]


def test_a_comparison_and_a_fork_read_the_source_of_their_text(llama):
    edit = hk.away_from(OTHERS, by=2.0)
    run = hk.generate(llama, TWO, edit, **GREEDY)
    both = hk.compare_generations(llama, TWO, edit, **GREEDY)
    assert both.texts["edited"].tolist() == run.generated
    assert both.texts["baseline"].tolist() == hk.generate(llama, TWO, **GREEDY).generated
    assert (both.summary["kl"] > 0).all()
    forked = hk.fork(run, step=1, token=9, row=0)
    new = new_tokens(forked)[0]
    own = last_logits(llama.model, llama.tokenizer.encode(TWO[0]) + new[:2])
    source = last_logits(llama.model, llama.tokenizer.encode(OTHERS[0]) + new[:2])
    edited = own - 2.0 * (source.log_softmax(-1) - own.log_softmax(-1))
    assert new[1] == 9 and new[2] == int(edited.argmax())


def test_rows_that_have_ended_do_not_disturb_the_others(lm):
    edit = hk.away_from(OTHERS, by=1.5)
    plain = hk.generate(lm, TWO, edit, **GREEDY)
    first, second = new_tokens(plain)
    end = next(token for token in first[:-1] if token not in second)
    ended = hk.generate(lm, TWO, edit, **{**GREEDY, "eos_token_id": end})
    assert new_tokens(ended) == [first[: first.index(end) + 1], second]


def test_sources_and_other_edits_act_in_their_order(llama):
    """Each reads the logits that the hooks before it have left."""
    plain = hk.forward(llama, "Tea").logits[0, -1]
    source = last_logits(llama.model, llama.tokenizer.encode("We love")).log_softmax(-1)
    banned = plain.clone()
    banned[7] = -torch.inf
    first = banned - 1.0 * (source - banned.log_softmax(-1))
    first[7] = -torch.inf
    second = first + 0.5 * (source - first.log_softmax(-1))
    second[7] = -torch.inf
    hooks = hk.ban(7), hk.away_from("We love", by=1.0), hk.toward("We love", by=0.5)
    edited = hk.forward(llama, "Tea", *hooks).logits[0, -1]
    assert torch.allclose(edited, second, atol=1e-5)
    forced = hk.generate(llama, "Tea", *hooks, hk.force(9, step=1), **SAMPLED)
    assert new_tokens(forced)[0][1] == 9


def test_where_a_step_or_a_condition_leaves_it_out_it_catches_up(llama):
    rows = [llama.tokenizer.encode(text) for text in TWO]
    plain = hk.generate(llama, TWO, **GREEDY)
    run = hk.generate(llama, TWO, hk.away_from(OTHERS, by=2.0, step=[1, 4]), **GREEDY)
    starts = [llama.tokenizer.encode(text) for text in OTHERS]
    for row in range(2):
        new = new_tokens(run)[row]
        for step in range(STEPS):
            own = last_logits(llama.model, rows[row] + new[:step])
            other = last_logits(llama.model, starts[row] + new[:step]).log_softmax(-1)
            changed = own - 2.0 * (other - own.log_softmax(-1))
            expected = changed if step in (1, 4) else own
            assert torch.allclose(run.logits[row, step], expected, atol=2e-4)
    assert run.generated != plain.generated
    at_all = hk.generate(
        llama, TWO, hk.away_from(OTHERS, by=2.0, when=hk.when.entropy_above(0.0)), **GREEDY
    )
    assert (
        at_all.generated
        == hk.generate(llama, TWO, hk.away_from(OTHERS, by=2.0), **GREEDY).generated
    )
    never = hk.away_from(OTHERS, by=2.0, when=hk.when.entropy_above(50.0))
    assert torch.equal(hk.generate(llama, TWO, never, **GREEDY).logits, plain.logits)


def test_attach_around_someone_elses_generate_gives_the_same_tokens(lm):
    ids = torch.tensor([lm.tokenizer.encode(TWO[0])])
    expected = new_tokens(hk.generate(lm, TWO[0], hk.away_from("We love", by=1.5), **GREEDY))
    before = state_of(lm.model)
    with hk.attach(lm, hk.away_from("We love", by=1.5)) as manager:
        for _ in range(2):
            tokens = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            assert tokens[0, ids.shape[1] :].tolist() == expected[0]
    assert set(manager.log["forward"]) == set(range(2 * STEPS))
    assert same_state(lm.model, before) == []


def test_the_hooks_of_an_outer_block_do_not_act_in_a_source(lm):
    ids = lm.tokenizer.encode("Tea")
    alone = last_logits(lm.model, lm.tokenizer.encode("We love")).log_softmax(-1)
    edits = hk.steer("resid_post.1", VECTOR), hk.scale("pattern.0", 0.5)
    with hk.attach(lm, *edits, hk.capture("resid_post.0", pos=hk.PROMPT)) as manager:
        own = last_logits(lm.model, ids)
    with hk.attach(lm, *edits, hk.capture("resid_post.0", pos=hk.PROMPT)) as manager:
        run = hk.forward(lm, "Tea", hk.toward("We love", by=1.0))
    assert manager.log["forward"].max() == 0
    expected = own + (alone - own.log_softmax(-1))
    assert torch.allclose(run.logits[0, -1], expected, atol=1e-4)


def test_a_run_that_is_interrupted_in_a_source_leaves_no_hook_and_acts_again(lm):
    before = state_of(lm.model)
    other = hk.LM(hk.tiny(lm.config.model_type, seed=7).model, lm.tokenizer)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = other.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        hk.generate(lm, TWO, hk.steer("resid_post.1", VECTOR), hk.toward(other, by=1.0), **GREEDY)
    handle.remove()
    assert same_state(lm.model, before) == [] and hooks_on(other.model) == hooks_on(lm.model)
    assert not torch.equal(
        hk.forward(lm, TWO, hk.steer("resid_post.1", VECTOR)).logits, hk.forward(lm, TWO).logits
    )


def test_a_masked_model_reads_its_twin_at_a_mask():
    masked = hk.tiny("bert")
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    edits = hk.scale("resid_post.0", 2.0), hk.toward(hk.UNEDITED, by=1.0, pos=1)
    run, plain = hk.forward(masked, ids, *edits), hk.forward(masked, ids)
    got = run.logits[:, 1].log_softmax(-1)
    assert torch.allclose(got, plain.logits[:, 1].log_softmax(-1), atol=1e-4)


def test_contrast_is_transformers_own_guidance_on_the_default_model(smol):
    lm = smol
    prompt, other = "The capital of France is", "The capital of Italy is"
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = lm.tokenizer(prompt, return_tensors="pt")
    negative = lm.tokenizer(other, return_tensors="pt")["input_ids"]
    guided = lm.model.generate(**ids, guidance_scale=3.0, negative_prompt_ids=negative, **settings)
    run = hk.generate(lm, prompt, hk.away_from(other, by=2.0), **settings)
    assert run.tokens[0].tolist() == guided[0].tolist()
    assert run.generated != hk.generate(lm, prompt, **settings).generated


def test_the_trace_has_the_source_as_a_stage_and_decisions_say_what_it_did(llama):
    edit = hk.away_from("We love", by=3.0, step=[2, 3], rows=0)
    run = hk.generate(llama, TWO, edit, trace=hk.trace(top=3), **GREEDY)
    table = hk.candidates(run)
    sources = table[table["stage"] == "source"]
    assert set(zip(sources["row"], sources["step"], strict=True)) == {(0, 2), (0, 3)}
    start = llama.tokenizer.encode("We love")
    for step in (2, 3):
        logits = last_logits(llama.model, start + new_tokens(run)[0][:step])
        part = sources[sources["step"] == step]
        assert torch.allclose(
            torch.tensor(part["logprob"].tolist()),
            logits.log_softmax(-1)[part["token_id"].tolist()],
            atol=1e-4,
        )
        assert part["token_id"].tolist()[:3] == logits.topk(3).indices.tolist()
    decisions = hk.decisions(run)
    moved = decisions[decisions["rank_model"] != decisions["rank_edited"]]
    assert len(moved)
    for _, line in moved.iterrows():
        ranks = f"from rank {line['rank_model']} to {line['rank_edited']}"
        assert f"contrast with the prompt 'We love' moved it {ranks}" in line["why"]
    steps = list(hk.stream(llama, TWO, edit, **GREEDY))
    assert steps[-1].text == run.text
    assert "source" in set(steps[2].candidates["stage"])
    two = hk.generate(
        llama, TWO[0], edit, hk.toward(hk.UNEDITED, by=0.5), trace=hk.trace(), **GREEDY
    )
    assert {"source 1", "source 2"} <= set(hk.candidates(two)["stage"])


def test_the_command_line_reads_a_source(llama, hookkit):
    words = ("generate", "Tea", "--hook", "away_from:We love@by=1.5", "--max-new-tokens", "4")
    printed = hookkit(*words)
    run = hk.generate(llama, "Tea", hk.away_from("We love", by=1.5), max_new_tokens=4)
    assert printed.exit_code == 0, printed.output
    assert run.text[0] in printed.output


def test_a_source_that_cannot_be_read_is_refused_with_the_reason(llama):
    edit = hk.away_from("We love", by=1.0)
    with pytest.raises(Unsupported, match="not in a sweep"):
        hk.sweep(llama, TWO, {"edit": [edit]}, lambda edit: edit, hk.metrics.prob(7))
    with pytest.raises(Unsupported, match="a lens"):
        hk.logit_lens(llama, TWO, edit)
    with pytest.raises(Unsupported, match="step=0"):
        hk.forward(llama, TWO, hk.away_from("We love", by=1.0, pos=1, rows=0))
    with pytest.raises(Unsupported, match="encoder-decoder"):
        hk.forward(hk.tiny("t5"), [[5, 6]], hk.away_from(hk.UNEDITED, by=1.0))
    with pytest.raises(hk.errors.BadHook, match="3 prompts, and 2 rows"):
        hk.generate(llama, TWO, hk.away_from(PROMPTS, by=1.0), **GREEDY)
    with pytest.raises(OtherVocabulary, match="has 500 tokens and the model 320"):
        hk.forward(llama, TWO, hk.toward(hk.tiny("llama", config={"vocab_size": 500}), by=1.0))
    rules = json.loads(llama.tokenizer.backend_tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    with pytest.raises(OtherVocabulary, match=r"differ in 2 tokens: id \d+ is 'a' in the model"):
        hk.forward(llama, TWO, hk.toward(hk.LM(llama.model, swapped), by=1.0))
    embeddings = llama.model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with (
        pytest.raises(Unsupported, match="embeddings"),
        hk.attach(llama, hk.toward(hk.UNEDITED, by=1.0)),
    ):
        llama.model(inputs_embeds=embeddings)
    split = hk.LM(llama.model, llama.tokenizer)
    split.__dict__["ranks"] = SimpleNamespace(count=2)  # as of a model on two processes
    with pytest.raises(Unsupported, match="held by 2 processes"):
        hk.attach(llama, hk.toward(split, by=1.0))
    keeps_state = hk.tiny("recurrent_gemma")
    with pytest.raises(Unsupported, match="in its own modules"):
        hk.forward(keeps_state, [[5, 6]], hk.toward([7], by=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "bloom", "bamba", "lfm2", "mamba", "rwkv", "gemma3_text"])
def test_the_cache_of_a_source_is_right_in_families_with_caches_of_their_own(name):
    lm, prompt, other = hk.tiny(name), [5, 6, 7, 8, 9], [11, 12, 13]
    run = hk.generate(lm, prompt, hk.away_from(other, by=0.5), **GREEDY)
    new = new_tokens(run)[0]
    for step in range(STEPS):
        own = last_logits(lm.model, prompt + new[:step])
        source = last_logits(lm.model, other + new[:step]).log_softmax(-1)
        expected = own - 0.5 * (source - own.log_softmax(-1))
        assert torch.allclose(run.logits[0, step], expected, atol=2e-4)
