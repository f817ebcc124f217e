"""The hooks of a run as a processor, in the generate, pipelines and loops of other people."""

import threading

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextGenerationPipeline,
)

import hookkit as hk
from hookkit.errors import BadArgument, BadEdit, BadHook, EmptySelection, OutOfRange, Unsupported

PROMPTS = [[105, 106, 107], [108, 109, 110, 111, 112], [113]]
NEW = 8
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "top_k": 0},
    "top-k, top-p, several of each": {
        "do_sample": True,
        "top_k": 40,
        "top_p": 0.9,
        "num_return_sequences": 2,
    },
}

EDITS = {
    "forced at steps and in rows": [hk.force(9, step=1, rows=1), hk.force(120, step=[0, 2])],
    "a word of several tokens": [hk.force(hk.word([12, 13, 14]), step=2, rows=[0, 2])],
    "banned, raised, lowered": [
        hk.ban(hk.word([223, 219]), 91),
        hk.boost(30, 31, by=4.0, rows=0),
        hk.cap(8, prob=0.01),
        hk.set_rank(40, 3, step=3),
    ],
    "where a condition holds": [
        hk.boost(35, by=6.0, when=hk.when.rank_of(35, at_least=20)),
        hk.swap(36, 37, when=hk.when.entropy_above(1.0)),
    ],
}


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts with padding on the left, by hand."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def plain(lm: hk.LM, processors: list[object], prompts=PROMPTS, new=NEW, seed=3, **settings):
    """The new tokens of transformers' own generate."""
    inputs = padded(prompts)
    torch.manual_seed(seed)
    output = lm.model.generate(
        **inputs,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        max_new_tokens=new,
        **settings,
    )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def hooked(lm: hk.LM, hooks: list[hk.types.Hook], prompts=PROMPTS, new=NEW, **settings):
    run = hk.generate(lm, prompts, *hooks, seed=3, max_new_tokens=new, pad_token_id=0, **settings)
    rows = zip(run.tokens.tolist(), run.prompt_lengths, strict=True)
    return [(row[start:] + [0] * new)[:new] for row, start in rows]


def filled(rows: list[list[int]]) -> list[list[int]]:
    return [(row + [0] * NEW)[:NEW] for row in rows]


@pytest.mark.parametrize("hooks", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_transformers_generate_takes_the_same_tokens_as_hk_generate(llama, settings, hooks):
    expected = hooked(llama, hooks, **settings)
    tokens = filled(plain(llama, [hk.logits_processor(llama, *hooks)], **settings))
    assert tokens == expected
    assert tokens != filled(plain(llama, [], **settings)), "the hooks change something"


def test_words_given_as_text_mean_the_same(smol):
    hooks = [hk.force(hk.word(" a cup of tea", exact=True), step=1), hk.ban(hk.word("the"))]
    prompts = ["I like oat milk in my", "The capital of France is"]
    run = hk.generate(smol, prompts, *hooks, max_new_tokens=6, do_sample=False)
    rows = [smol.tokenizer(text).input_ids for text in prompts]
    tokens = plain(smol, [hk.logits_processor(smol, *hooks)], rows, 6, do_sample=False)
    assert [smol.text(row) for row in tokens] == run.generated
    assert all(" a cup of tea" in smol.text(row) for row in tokens)


def test_a_rule_of_transformers_that_would_act_first_is_passed_behind_the_hooks(llama):
    hooks = [hk.boost(30, 31, by=4.0), hk.force(9, step=2)]
    processor = hk.logits_processor(llama, *hooks)
    with pytest.raises(Unsupported, match="RepetitionPenaltyLogitsProcessor acts before boost"):
        plain(llama, [processor], do_sample=False, repetition_penalty=3.0)
    pads = torch.tensor([2, 0, 4])
    penalty = RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=pads)
    settings = {"do_sample": True, "top_k": 30, "top_p": 0.95}
    expected = hooked(llama, hooks, repetition_penalty=3.0, **settings)
    assert filled(plain(llama, [processor, penalty], **settings)) == expected
    assert expected != hooked(llama, hooks, **settings)


@pytest.mark.parametrize("mode", ["greedy", "sampled", "top-k, top-p, several of each"])
def test_force_ban_and_restrict_mean_the_same_before_and_after_every_rule(llama, mode):
    settings = MODES[mode]
    hooks = [hk.force(9, step=1), hk.ban(91, hk.word([223, 219])), hk.force(110, step=5, rows=1)]
    rules = {
        "repetition_penalty": 2.0,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [9, 47],
        "min_new_tokens": 4,
        "sequence_bias": {(8,): -5.0},
    }
    expected = hooked(llama, hooks, **rules, **settings)
    processor = hk.logits_processor(llama, *hooks)
    assert filled(plain(llama, [processor], **rules, **settings)) == expected
    restricted = [hk.restrict(range(100, 200))]
    expected = hooked(llama, restricted, **rules, **settings)
    processor = hk.logits_processor(llama, *restricted)
    assert filled(plain(llama, [processor], **rules, **settings)) == expected


def test_one_processor_serves_one_generate_after_another(llama):
    hooks = [hk.force(hk.word([12, 13, 14]), when=hk.when.entropy_above(0.5)), hk.ban(91)]
    processor = hk.logits_processor(llama, *hooks)
    for prompts in (PROMPTS, PROMPTS[::-1], [[1, 2]], [[1, 2]]):
        tokens = plain(llama, [processor], prompts, do_sample=False)
        assert filled(tokens) == hooked(llama, hooks, prompts, do_sample=False)


def test_a_generate_that_goes_on_from_the_last_one_begins_at_step_0(llama):
    processor = hk.logits_processor(llama, hk.force(9, step=0))
    row = [105, 106]
    for count in range(1, 4):
        (new,) = plain(llama, [processor], [row], 1, do_sample=False)
        row = row + new
        assert row[2:] == [9] * count


def test_two_threads_may_use_one_processor(llama):
    hooks = [hk.force(9, step=[0, 5])]
    processor = hk.logits_processor(llama, *hooks)
    expected, tokens = plain(llama, [processor], do_sample=False), {}

    def work(number: int) -> None:
        inputs = padded(PROMPTS)
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        output = llama.model.generate(**inputs, logits_processor=[processor], **settings)
        tokens[number] = output[:, 5:].tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [tokens[number] for number in range(3)] == [expected] * 3


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_transformers_writes_the_same_text(small_tokenizer):
    lm = hk.tiny("llama", tokenizer=small_tokenizer)
    tokenizer = small_tokenizer
    old, side = tokenizer.pad_token, tokenizer.padding_side
    prompts = ["I like oat milk in my", "Tea", "The store is in"]
    hooks = [hk.force(hk.word(" coffee", exact=True), step=1), hk.boost(" tea", "a", by=5.0)]
    hooks = [hooks[0], hk.boost(" the", by=5.0)]
    run = hk.generate(lm, prompts, *hooks, max_new_tokens=NEW, do_sample=False)
    try:
        tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
        pipeline = TextGenerationPipeline(model=lm.model, tokenizer=tokenizer)
        outputs = pipeline(
            prompts,
            batch_size=3,
            return_tensors=True,
            logits_processor=LogitsProcessorList([hk.logits_processor(lm, *hooks)]),
            max_new_tokens=NEW,
            do_sample=False,
        )
    finally:
        tokenizer.pad_token, tokenizer.padding_side = old, side
    for (output,), tokens, length in zip(outputs, run.tokens, run.lengths, strict=True):
        ids = output["generated_token_ids"]
        assert ids[-length:] == tokens[:length].tolist()


def test_a_decoding_loop_of_ones_own_is_followed_by_its_tokens(llama):
    hooks = [hk.force(hk.word([12, 13, 14]), step=1, rows=1), hk.boost(30, by=5.0, step=0)]
    lm = hk.LM(llama.model, None)
    processor = hk.logits_processor(lm, *hooks)
    for _ in range(2):
        inputs = padded(PROMPTS[:2])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(NEW):
            with torch.no_grad():
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions)
            scores = processor(ids, output.logits[:, -1].float())
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        assert ids[:, 5:].tolist() == hooked(llama, hooks, PROMPTS[:2], do_sample=False)


class Without(LogitsProcessor):
    """A processor that rules out all tokens from `first` on, or one."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


def test_a_later_processor_that_rules_a_decided_token_out_is_a_contradiction(llama):
    processor = hk.logits_processor(llama, hk.force(9, step=1))
    with pytest.raises(BadEdit, match="decides on token 9 in row 0"):
        plain(llama, [processor, Without(9)], do_sample=False)


def test_beams_refuse_hooks_that_read_the_size_of_logits(llama):
    beams = {"num_beams": 2, "do_sample": False}
    sizes = [
        hk.cap(8, logit=-1.0),
        hk.scale("logits", 2.0),
        hk.edit("logits", torch.tanh),
        hk.boost(8, by=1.0, when=lambda logits, here: True),
    ]
    for hook in sizes:
        processor = hk.logits_processor(llama, hook)
        with pytest.raises(Unsupported, match="beam search passes log-probabilities"):
            plain(llama, [processor], **beams)
        expected = hooked(llama, [hook], do_sample=False)
        assert filled(plain(llama, [processor], do_sample=False)) == expected
    moved = hk.steer("logits", torch.linspace(0, 3, 320))
    processor = hk.logits_processor(llama, moved)
    assert filled(plain(llama, [processor], **beams)) == hooked(llama, [moved], **beams)


def test_what_a_processor_cannot_do_is_refused_by_name(llama):
    with pytest.raises(EmptySelection, match="was given no hook"):
        hk.logits_processor(llama)
    for hook in (hk.capture("logits"), hk.ablate("z.0"), hk.force(9, site="lm_head")):
        with pytest.raises(BadHook, match=f"{hook.verb} acts elsewhere"):
            hk.logits_processor(llama, hook)
    with pytest.raises(BadHook, match="needs forwards of its source"):
        hk.logits_processor(llama, hk.away_from("Tea", by=1.0))
    with pytest.raises(BadArgument):
        hk.logits_processor(llama, Without(9))
    late = hk.logits_processor(llama, hk.force(9, step=NEW))
    with pytest.raises(OutOfRange, match=f"at most {NEW} tokens are generated"):
        plain(llama, [late], do_sample=False)
    processor = hk.logits_processor(llama, hk.force(9))
    with pytest.raises(Unsupported, match="NoRepeatNGramLogitsProcessor acts before"):
        plain(llama, [processor], num_beams=2, do_sample=False, no_repeat_ngram_size=2)
    with pytest.raises(Unsupported, match="two processors of hooks"):
        plain(llama, [processor, hk.logits_processor(llama, hk.ban(9))], do_sample=False)
    with pytest.raises(Unsupported, match="one call for each token"):
        plain(llama, [processor], [[5, 6, 7, 5, 6]], do_sample=False, prompt_lookup_num_tokens=2)
    embeddings = llama.model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with pytest.raises(Unsupported, match="given as embeddings"):
        llama.model.generate(
            inputs_embeds=embeddings, logits_processor=[processor], max_new_tokens=2
        )
    word = hk.force(hk.word([12, 13]), when=hk.when.entropy_above(0.1))
    with pytest.raises(Unsupported, match="beam search"):
        plain(llama, [hk.logits_processor(llama, word)], num_beams=2, do_sample=False)


def test_it_prints_its_hooks(llama):
    text = repr(hk.logits_processor(llama, hk.force(9), hk.ban(8)))
    assert "force(9), ban(8)" in text
    assert isinstance(hk.logits_processor(llama, hk.force(9)), LogitsProcessor)
