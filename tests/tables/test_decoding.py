"""Tables of a generation: the numbers against closed forms, the reasons against sentences written by hand."""

import functools
import math

import by_hand
import pytest
import torch
from conftest import PROMPTS
from transformers import LogitsProcessor

import hookkit as hk
from hookkit.errors import NotCaptured, OutOfRange

FRANCE = "The capital of France is"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STAGES = ["model", "edited", "processed"]
CANDIDATES = [
    "row",
    "step",
    "pos",
    "stage",
    "token",
    "token_id",
    "logit",
    "logprob",
    "prob",
    "rank",
    "drawn",
    "why",
]


@functools.cache
def said_by(model, ids):
    """What plain transformers says behind these tokens."""
    return by_hand.logits(model, list(ids))[0, -1]


def ranked(logits):
    """The rank of every token, by a full sort: the place of the first that is equal to it."""
    ordered = torch.sort(logits, descending=True).values
    return torch.searchsorted(-ordered, -logits) + 1


class Edited(LogitsProcessor):
    """A user's own rule."""

    def __init__(self, edit):
        self.edit = edit

    def __call__(self, input_ids, scores):
        return self.edit(scores.clone())


def set_to(**logits):
    """An edit that gives tokens, by id, a logit of their own."""

    def edit(values, here):
        values = values.clone()
        for token, logit in logits.items():
            values[..., int(token[1:])] = logit
        return values

    return edit


# ---- numbers


@pytest.fixture(scope="module")
def whole(llama):
    """A run of which every token is on record at every stage, and by hand the logits of each of its stages."""
    hooks = [hk.ban(7), hk.boost(9, 11, by=2.0)]
    rules = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9}
    run = hk.generate(
        llama,
        PROMPTS[:2],
        *hooks,
        trace=hk.trace(top=320, watch=[5, 6]),
        seed=3,
        **{**GREEDY, **rules},
    )
    expected = {}
    for row, (tokens, start, end) in enumerate(
        zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    ):
        for step, logits in enumerate(
            by_hand.logits(llama.model, tokens[: end - 1])[0, start - 1 :]
        ):
            edited = logits.clone()
            edited[7], edited[[9, 11]] = -torch.inf, edited[[9, 11]] + 2.0
            sharp = (edited / 0.5).sort(descending=True)
            before = sharp.values.softmax(0).cumsum(0) - sharp.values.softmax(0)
            processed = (edited / 0.5).index_fill(0, sharp.indices[before >= 0.9], -torch.inf)
            expected |= {
                (row, step, "model"): logits,
                (row, step, "edited"): edited,
                (row, step, "processed"): processed,
            }
    return run, expected


def test_decoding_has_every_number_of_every_candidate(whole, llama):
    run, expected = whole
    table = hk.candidates(run)
    assert list(table.columns) == CANDIDATES
    found = dict(list(table.groupby(["row", "step", "stage"])))
    assert found.keys() == expected.keys()
    for where, logits in expected.items():
        part = found[where].sort_values("token_id")
        probs = logits.exp() / logits.exp().sum()
        assert list(part["token_id"]) == list(range(320))
        assert list(part["token"]) == [by_hand.token_text(llama.tokenizer, i) for i in range(320)]
        assert torch.allclose(torch.tensor(part["logit"].to_numpy()).float(), logits, atol=1e-4)
        assert torch.allclose(torch.tensor(part["prob"].to_numpy()).float(), probs, atol=1e-5)
        assert torch.allclose(
            torch.tensor(part["logprob"].to_numpy()).float(), probs.log(), atol=1e-4
        )
        # neighbours may lie closer than the cache and a whole forward agree, so the sort is of the numbers on record
        assert list(part["rank"]) == ranked(torch.tensor(part["logit"].to_numpy())).tolist()
        assert part["prob"].sum() == pytest.approx(1, abs=1e-5)


def test_decisions_have_the_closed_forms(whole, llama):
    run, expected = whole
    table = hk.decisions(run)
    assert len(table) == 6
    for _, line in table.iterrows():
        for name in STAGES:
            logits = expected[line["row"], line["step"], name].double()
            token, probs = line["token_id"], logits.softmax(0)
            surprise = torch.where(probs > 0, -probs.log(), 0.0)
            entropy = float((probs * surprise).sum())
            first, second = logits.sort(descending=True).values[:2].tolist()
            assert line[f"logit_{name}"] == pytest.approx(float(logits[token]), abs=1e-4)
            assert line[f"prob_{name}"] == pytest.approx(float(probs[token]), abs=1e-5)
            assert line[f"rank_{name}"] == int(ranked(logits)[token])
            assert line[f"entropy_{name}"] == pytest.approx(entropy, abs=1e-4)
            assert line[f"perplexity_{name}"] == pytest.approx(math.exp(entropy), rel=1e-3)
            assert line[f"varentropy_{name}"] == pytest.approx(
                float((probs * (surprise - entropy) ** 2).sum()), abs=1e-3
            )
            assert line[f"margin_{name}"] == pytest.approx(first - second, abs=1e-4)
        model, processed = (
            expected[line["row"], line["step"], name] for name in ("model", "processed")
        )
        assert line["candidates"] == int(processed.isfinite().sum())
        assert line["top1_model"] == by_hand.token_text(llama.tokenizer, int(model.argmax()))
        assert line["token"] == by_hand.token_text(llama.tokenizer, line["token_id"])
        assert line["pos"] == run.prompt_lengths[line["row"]] - 1 + line["step"]
        assert int(run.tokens[line["row"], line["pos"] + 1]) == line["token_id"]


def test_the_tables_show_the_top_the_watched_the_named_and_the_drawn(llama):
    hooks = [hk.ban(7), hk.swap(9, 11, rows=1)]
    settings = {**GREEDY, "do_sample": True, "temperature": 3.0, "seed": 1}
    run = hk.generate(llama, PROMPTS[:2], *hooks, trace=hk.trace(top=4, watch=[5, 7]), **settings)
    table = hk.candidates(run)
    drawn = table[table["drawn"]]
    assert [(line.row, line.step, line.stage) for line in drawn.itertuples()] == [
        (row, step, name) for row in range(2) for step in range(3) for name in STAGES
    ]
    assert list(drawn["token_id"]) == [i for row in range(2) for i in run.tokens[row].tolist()[
        run.prompt_lengths[row] : run.lengths[row]] for _ in STAGES]  # fmt: skip
    for (row, step, name), part in table.groupby(["row", "step", "stage"]):
        said = run.logits[row, step]
        token = int(run.tokens[row, run.prompt_lengths[row] + step])
        why = dict(zip(part["token_id"], part["why"], strict=True))
        assert why.keys() >= {5, 7, 9, 11, token}
        assert [i for i, reason in why.items() if "drawn" in reason] == [token]
        assert [i for i in why if "watched" in why[i]] == [i for i in why if i in (5, 7)]
        assert [i for i in why if "named" in why[i]] == [i for i in why if i in (7, 9, 11)]
        assert sum("top" in reason for reason in why.values()) == 4
        assert part["rank"].is_monotonic_increasing and part["token_id"].is_unique
        if name == "edited":
            assert {i for i in why if "top" in why[i]} == set(said.topk(4).indices.tolist())
    assert all(", ".join(reason.split(", ")) == reason for reason in table["why"])


def test_fewer_of_the_top_and_some_of_the_rows_can_be_shown(llama):
    run = hk.generate(llama, PROMPTS, trace=hk.trace(top=4), **GREEDY)
    assert hk.candidates(run).groupby(["row", "step", "stage"]).size().unique() == [4]
    short = hk.candidates(run, top=1, rows=[2, 0])
    assert list(short["row"]) == [row for row in (0, 2) for _ in range(9)]
    assert (short["rank"] == 1).all() and short["drawn"].all()
    assert hk.decisions(run, rows=1)["row"].tolist() == [1, 1, 1]
    with pytest.raises(OutOfRange):
        hk.decisions(run, rows=3)


@pytest.mark.parametrize("top", [0, -1, 5])
def test_more_or_less_of_the_top_than_is_on_record_is_refused(llama, top):
    run = hk.generate(llama, PROMPTS[0], trace=hk.trace(top=4), **GREEDY)
    with pytest.raises(
        OutOfRange, match=f"top={top!r}: 4 tokens of each stage are on record, so give 1 to 4"
    ):
        hk.candidates(run, top=top)


@pytest.mark.parametrize("table", [hk.candidates, hk.decisions])
def test_a_run_without_a_trace_has_no_steps_to_show(llama, table):
    words = (
        r"this run kept no record of its steps: make it with hk.generate\(..., trace=hk.trace\(\)\)"
    )
    for run in (hk.generate(llama, PROMPTS[0], **GREEDY), hk.forward(llama, PROMPTS[0])):
        with pytest.raises(NotCaptured, match=words):
            table(run)


def test_the_model_itself_would_have_said_the_token_that_greedy_decoding_takes_of_equals(llama):
    """Of tokens that share the largest logit, greedy decoding takes the one with the lowest id."""
    plain = by_hand.logits(llama.model, llama.tokenizer.encode(PROMPTS[0]))[0, -1]
    low, high = sorted([int(plain.argmax()), int(plain.argmin())])

    def head(module, args, output):  # stands for a model whose own logits are equal
        return output.index_fill(-1, torch.tensor([low, high]), 100.0)

    mine = llama.model.lm_head.register_forward_hook(head)
    try:
        run = hk.generate(llama, PROMPTS[0], trace=hk.trace(top=1), **GREEDY)
    finally:
        mine.remove()
    table = hk.decisions(run)
    assert list(table["token_id"]) == [low] * 3
    assert list(table["top1_model"]) == list(table["token"])
    assert (
        list(table["why"])
        == ["greedy: first of 320, with the lowest id of those that share the largest logit"] * 3
    )


# ---- why


def share(logits, here):
    """Paris and the get the larger logit of the two."""
    both = [7042, 260]
    logits = logits.clone()
    logits[..., both] = logits[..., both].amax(dim=-1, keepdim=True)
    return logits


def never(logits, here):
    return False


def penalized(scores):
    scores[:, 7042] -= 5.0
    return scores


PHRASE = hk.word(" a cup of tea", exact=True)
# hooks, arguments of generate, the step in question, the token that is chosen there, and the sentence, in which
# {m[ Paris]} is the rank of " Paris" in the model's own logits
CASES = {
    "greedy": ([], {}, 0, " Paris", "greedy: first of 49152"),
    "greedy, second step": ([], {}, 1, ".", "greedy: first of 49152"),
    "a tie": (
        [hk.edit("logits", share)], {}, 0, " the",
        "greedy: first of 49152, with the lowest id of those that share the largest logit; "
        "edit(share) moved it from rank {m[ the]} to 1",
    ),
    "forced": ([hk.force(" coffee")], {}, 0, " coffee", "forced by force(' coffee'): rank {m[ coffee]} for the model"),
    "forced at a step": (
        [hk.force(" coffee", step=1)], {}, 1, " coffee", "forced by force(' coffee', step=1): rank {m[ coffee]} for the model",
    ),
    "before it is forced": ([hk.force(" coffee", step=1)], {"max_new_tokens": 2}, 0, " Paris", "greedy: first of 49152"),
    "forced, and first anyway": (
        [hk.force(" Paris", step=0)], {}, 0, " Paris", "forced by force(' Paris', step=0): rank 1 for the model",
    ),
    "forced alone": (
        [hk.force(" tea", margin=math.inf)], {"do_sample": True, "temperature": 2.0}, 0, " tea",
        "forced by force(' tea', margin=inf): rank {m[ tea]} for the model",
    ),
    "forced by the later of two": (
        [hk.force(" tea"), hk.force(" coffee")], {}, 0, " coffee", "forced by force(' coffee'): rank {m[ coffee]} for the model",
    ),
    "forced, and the first banned": (
        [hk.ban(" Paris"), hk.force(" tea")], {}, 0, " tea",
        "forced by force(' tea'): rank {m[ tea]} for the model; banned ' Paris' was first for the model",
    ),
    "a phrase, first token": (
        [hk.force(PHRASE)], {"max_new_tokens": 4}, 0, " a", "forced by force(word(' a cup of tea', exact=True)): rank {m[ a]} for the model",
    ),
    "a phrase, third token": (
        [hk.force(PHRASE)], {"max_new_tokens": 4}, 2, " of", "forced by force(word(' a cup of tea', exact=True)): rank {m[ of]} for the model",
    ),
    "a phrase from a step on": (
        [hk.force(PHRASE, step=1)], {"max_new_tokens": 5}, 2, " cup",
        "forced by force(word(' a cup of tea', exact=True), step=1): rank {m[ cup]} for the model",
    ),
    "another token of the phrase than the one that is due": (
        [hk.force(PHRASE), hk.boost(" tea", by=100.0, step=0)], {"max_new_tokens": 4}, 0, " tea",
        "greedy: first of 49152; boost(' tea', by=100.0, step=0) moved it from rank {m[ tea]} to 1",
    ),
    "a condition that holds": (
        [hk.force(" tea", when=hk.when.entropy_above(0.1))], {}, 0, " tea",
        "forced by force(' tea', when=entropy_above(0.1)): rank {m[ tea]} for the model",
    ),
    "a condition that does not hold": (
        [hk.force(" tea", when=hk.when.rank_of(" tea", at_most=1))], {}, 0, " Paris", "greedy: first of 49152",
    ),
    "a function that says no": ([hk.ban(" Paris", when=never)], {}, 0, " Paris", "greedy: first of 49152"),
    "banned, and first": ([hk.ban(" Paris")], {}, 0, " the", "greedy: first of 49151; banned ' Paris' was first for the model"),
    "banned, and not first": ([hk.ban(" tea")], {}, 0, " Paris", "greedy: first of 49151"),
    "banned twice over": (
        [hk.ban(" Paris", " tea"), hk.ban(" Paris", " coffee")], {}, 0, " the",
        "greedy: first of 49149; banned ' Paris' was first for the model",
    ),
    "another token of the banned phrase": (
        [hk.ban(hk.word(" is Paris", exact=True)), hk.ban(" Paris")], {}, 0, " the",
        "greedy: first of 49150; banned ' Paris' was first for the model",
    ),
    "a phrase, completed": (
        [hk.ban(hk.word(" is Paris", exact=True))], {}, 0, " the", "greedy: first of 49150; banned ' Paris' was first for the model",
    ),
    "banned, and a third boosted": (
        [hk.ban(" Paris"), hk.boost(" tea", by=1.0)], {}, 0, " the",
        "greedy: first of 49151; banned ' Paris' was first for the model",
    ),
    "restricted": (
        [hk.restrict(" London", " Rome")], {}, 0, " London",
        "greedy: first of 2; restrict(' London', ' Rome') left out ' Paris', first for the model",
    ),
    "restricted to one": (
        [hk.restrict(" London")], {"do_sample": True}, 0, " London",
        "the only candidate left (top_k = 50); restrict(' London') left out ' Paris', first for the model; "
        "rank {m[ London]} for the model",
    ),
    "restricted, and first": ([hk.restrict(" Paris", " Rome")], {}, 0, " Paris", "greedy: first of 2"),
    "boosted": (
        [hk.boost(" London", by=9.0)], {}, 0, " London",
        "greedy: first of 49152; boost(' London', by=9.0) moved it from rank {m[ London]} to 1",
    ),
    "boosted, each by its own": (
        [hk.boost(by={" London": 9.0, " tea": -1.0})], {}, 0, " London",
        "greedy: first of 49152; boost(by={{' London': 9.0, ' tea': -1.0}}) moved it from rank {m[ London]} to 1",
    ),
    "boosted, and first anyway": ([hk.boost(" Paris", by=1.0)], {}, 0, " Paris", "greedy: first of 49152"),
    "the first lowered": (
        [hk.boost(" Paris", by=-9.0)], {}, 0, " the",
        "greedy: first of 49152; boost(' Paris', by=-9.0) moved it from rank 2 to 1",
    ),
    "capped": (
        [hk.cap(" Paris", prob=0.01)], {}, 0, " the",
        "greedy: first of 49152; cap(' Paris', prob=0.01) moved it from rank 2 to 1",
    ),
    "swapped": (
        [hk.swap(" Paris", " tea")], {}, 0, " tea",
        "greedy: first of 49152; swap(' Paris', ' tea') moved it from rank {m[ tea]} to 1",
    ),
    "set to a rank": (
        [hk.set_rank(" tea", 1)], {}, 0, " tea", "greedy: first of 49152; set_rank(' tea', 1) moved it from rank {m[ tea]} to 1",
    ),
    "two that move it": (
        [hk.boost(" London", by=2.0), hk.boost(" Paris", " the", by=-9.0)], {}, 0, " London",
        "greedy: first of 49152; boost(' London', by=2.0) and boost(' Paris', ' the', by=-9.0) moved it from rank 3 to 1",
    ),
    "two, of which one moves it": (
        [hk.boost(" tea", by=0.5), hk.boost(" London", by=9.0), hk.boost(" coffee", by=0.5)], {}, 0, " London",
        "greedy: first of 49152; boost(' London', by=9.0) moved it from rank 3 to 1",
    ),
    "moved by the repetition penalty": (
        [], {"repetition_penalty": 1e4, "prompt": "one two one two one two one two one"}, 0, None,
        "greedy: first of 49152; the logits processors moved it from rank {m[drawn]} to 1",
    ),
    "moved by a user's processor": (
        [], {"logits_processor": [Edited(penalized)]}, 0, " the",
        "greedy: first of 49152; the logits processors moved it from rank 2 to 1",
    ),
    "moved by a hook and a user's processor": (
        [hk.set_rank(" tea", 2)], {"logits_processor": [Edited(penalized)]}, 0, " tea",
        "greedy: first of 49152; set_rank(' tea', 2) moved it from rank {m[ tea]} to 2; "
        "the logits processors moved it from rank 2 to 1",
    ),
    "the only one left": ([], {"do_sample": True, "top_k": 1}, 0, " Paris", "the only candidate left (top_k = 1)"),
    "beams": ([], {"num_beams": 3}, 0, " Paris", "beam search: rank 1 of 49152 on the best of 3 beams"),
    "beams, moved": (
        [hk.boost(" London", by=20.0, step=0)], {"num_beams": 2}, 0, " London",
        "beam search: rank 1 of 49152 on the best of 2 beams; boost(' London', by=20.0, step=0) moved it from rank 3 to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("hooks", "arguments", "step", "token", "sentence"), CASES.values(), ids=CASES
)
def test_why_says_what_made_the_token_the_one(smol, hooks, arguments, step, token, sentence):
    arguments = {"max_new_tokens": step + 1, "do_sample": False, "seed": 0, **arguments}
    prompt = arguments.pop("prompt", FRANCE)
    run = hk.generate(smol, prompt, *hooks, logits=False, trace=hk.trace(top=2), **arguments)
    line = hk.decisions(run).iloc[step]
    plain = said_by(smol.model, tuple(run.tokens[0, : line["pos"] + 1].tolist()))
    if token is not None:
        assert smol.tokenizer.decode([line["token_id"]]) == token
    rank = ranked(plain)
    places = {
        word: int(rank[smol.tokenizer.encode(word)[0]])
        for word in (" Paris", " the", " coffee", " tea", " London")
    }
    places |= {word: int(rank[smol.tokenizer.encode(word)[0]]) for word in (" a", " cup", " of")}
    assert line["why"] == sentence.format(m={**places, "drawn": int(rank[line["token_id"]])})


RULES = [
    ({}, "top_k = 50"),
    ({"top_k": 0}, ""),
    ({"top_k": 0, "temperature": 2.0}, "temperature = 2"),
    ({"top_k": 3}, "top_k = 3"),
    ({"top_k": 0, "top_p": 0.9}, "top_p = 0.9"),
    ({"top_k": 0, "min_p": 0.01}, "min_p = 0.01"),
    ({"top_k": 0, "typical_p": 0.9}, "typical_p = 0.9"),
    (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.95},
        "temperature = 1.5, top_k = 20, top_p = 0.95",
    ),
]


@pytest.mark.parametrize(("rules", "words"), RULES, ids=lambda value: str(value))
@pytest.mark.parametrize("seed", range(4))
def test_why_says_how_likely_a_drawn_token_was_under_the_rules(llama, rules, words, seed):
    settings = {"max_new_tokens": 1, "do_sample": True, "pad_token_id": 0, **rules}
    prompt = PROMPTS[0]
    torch.manual_seed(seed)
    told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected = llama.model.generate(
        **llama.tokenizer(prompt, return_tensors="pt"), **settings, **told
    )
    token, scores, logits = (
        int(expected.sequences[0, -1]),
        expected.scores[0][0],
        expected.logits[0][0],
    )
    run = hk.generate(llama, prompt, seed=seed, trace=hk.trace(top=2), **settings)
    (line,) = hk.decisions(run).to_dict("records")
    assert line["token_id"] == token
    prob, count = float(scores.softmax(0)[token]), int(scores.isfinite().sum())
    was, now = int(ranked(logits)[token]), int(ranked(scores)[token])
    sentence = f"drawn with p = {prob:.2g} among {count} candidates" + (
        f" ({words})" if words else ""
    )
    sentence += f"; rank {was} for the model" if was > 1 else ""
    sentence += f"; the logits processors moved it from rank {was} to {now}" if was != now else ""
    assert count > 1, "the case shows nothing"
    assert line["why"] == sentence


def test_each_row_has_its_own_reason(smol):
    hooks = [
        hk.force(" coffee", rows=0),
        hk.ban(" Paris", rows=1),
        hk.boost(" London", by=9.0, rows=2),
    ]
    prompts = [FRANCE, FRANCE, "So the capital of France is", FRANCE]
    run = hk.generate(smol, prompts, *hooks, trace=hk.trace(), max_new_tokens=1, do_sample=False)
    ranks = [ranked(said_by(smol.model, tuple(smol.tokenizer.encode(text)))) for text in prompts]
    coffee, london = smol.tokenizer.encode(" coffee")[0], smol.tokenizer.encode(" London")[0]
    assert list(hk.decisions(run)["why"]) == [
        f"forced by force(' coffee', rows=0): rank {ranks[0][coffee]} for the model",
        "greedy: first of 49151; banned ' Paris' was first for the model",
        f"greedy: first of 49152; boost(' London', by=9.0, rows=2) moved it from rank {ranks[2][london]} to 1",
        "greedy: first of 49152",
    ]


def test_rows_of_one_prompt_have_reasons_of_their_own_steps(llama):
    hooks = [hk.force(1, step=1, margin=math.inf), hk.force(9, step=0, margin=math.inf)]
    settings = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "eos_token_id": 1}
    table = hk.decisions(hk.generate(llama, PROMPTS[0], *hooks, trace=hk.trace(), **settings))
    assert table.groupby("row")["token_id"].apply(list).tolist() == [[9, 1], [9, 1]]
    assert all(why.startswith(f"forced by force({token}, margin=inf, step={step}): rank ") for why, token, step in zip(
        table["why"], table["token_id"], table["step"], strict=True))  # fmt: skip
