"""A forced token is the one that generate takes, however it decodes."""

import math

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadEdit

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
DRAWS = 500  # of each prompt
RULES = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
    "temperature 5": {"temperature": 5.0},
    "the first only": {"temperature": 5.0, "top_k": 1},
    "the first only, cold": {"temperature": 0.5, "top_k": 1},
    "the first 50": {"temperature": 5.0, "top_k": 50},
    "the first 50, cold": {"temperature": 0.5, "top_k": 50},
    "top_p": {"temperature": 5.0, "top_p": 0.5},
    "min_p": {"temperature": 5.0, "min_p": 0.1},
    "typical_p": {"temperature": 5.0, "typical_p": 0.5},
    "epsilon_cutoff": {"temperature": 5.0, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"temperature": 5.0, "eta_cutoff": 0.01},
    "repetition_penalty": {"repetition_penalty": 50.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[7], [9], [12], [13]]},
    "suppress_tokens": {"suppress_tokens": [7, 9, 12, 13]},
    "sequence_bias": {"sequence_bias": {(7,): -100.0}},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
    "renormalize_logits": {"renormalize_logits": True},
}


@pytest.fixture(scope="module")
def unsure() -> hk.LM:
    """A model whose logits are so close that a margin of 10 is overruled at a temperature of 5."""
    return hk.tiny("llama")


def written(run: hk.types.Run) -> list[list[int]]:
    """The tokens behind the prompt of each row."""
    rows = zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    return [row[start:end] for row, start, end in rows]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_forced_token_is_drawn_every_time(unsure, rules):
    hooks = [
        hk.force(7, step=0),
        hk.force(9, step=2, rows=0, when=hk.when.prob_of(9, at_most=1.0)),
        hk.force(hk.word([12, 13]), step=1, rows=1),
    ]
    settings = {
        "top_k": 0,
        "do_sample": True,
        "num_return_sequences": DRAWS,
        "max_new_tokens": 3,
        **rules,
    }
    run = hk.generate(unsure, PROMPTS, *hooks, seed=0, logits=False, **settings)
    rows = list(zip(run.prompt_rows, written(run), strict=True))
    assert len(rows) == 2 * DRAWS == 1000
    assert all(row[0] == 7 for _, row in rows)
    assert all(row[2] == 9 for prompt, row in rows if prompt == 0)
    assert all(row == [7, 12, 13] for prompt, row in rows if prompt == 1)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("margin", [0.5, 3.0, 10.0])
def test_a_margin_gives_the_token_the_share_of_draws_that_softmax_says(unsure, margin, temperature):
    draws = 4000
    plain = unsure.model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    plain[7] = plain.max() + margin
    expected = (plain / temperature).softmax(dim=-1)[7].item()
    run = hk.generate(
        unsure, [PROMPTS[0]], hk.force(7, margin=margin), seed=1, logits=False, do_sample=True,
        temperature=temperature, top_k=0, num_return_sequences=draws, max_new_tokens=1,
    )  # fmt: skip
    share = sum(row == [7] for row in written(run)) / draws
    # the interval of a fair draw, at four standard deviations
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)


def test_the_trace_tells_a_decision_from_a_push(unsure):
    def why(hook: hk.types.Hook, **settings: object) -> str:
        run = hk.generate(
            unsure, [PROMPTS[0]], hook, trace=hk.trace(), max_new_tokens=1, seed=0, **settings
        )
        return hk.decisions(run)["why"][0]

    assert why(hk.force(7)).startswith("forced by force(7): rank ")
    assert why(hk.force(7, margin=2.0)).startswith("pushed by force(7, margin=2.0): rank ")
    sampled = why(hk.force(7, margin=30.0), do_sample=True, top_k=0)
    assert sampled.startswith("drawn with p = 1 among 320 candidates; force(7, margin=30.0) moved")
    assert why(hk.force(7), do_sample=True, top_k=0).startswith("forced by force(7): rank ")


def test_a_margin_is_a_push_that_sampling_may_overrule(unsure):
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 0,
        "num_return_sequences": 100,
        "max_new_tokens": 1,
    }
    pushed = hk.generate(unsure, [PROMPTS[0]], hk.force(7, margin=10.0), seed=0, **settings)
    taken = sum(row == [7] for row in written(pushed))
    assert 0 < taken < 100
    push = torch.cat([pushed.logits[0, 0, :7], pushed.logits[0, 0, 8:]])
    assert pushed.logits[0, 0, 7] == pytest.approx(push.max().item() + 10.0, abs=1e-5)
    decided = hk.generate(unsure, [PROMPTS[0]], hk.force(7), seed=0, trace=hk.trace(), **settings)
    assert written(decided) == [[7]] * 100
    assert torch.equal(decided.logits[0], pushed.logits[0])  # the tables say the same of both
    assert {why.split(":")[0] for why in hk.decisions(decided)["why"]} == {"forced by force(7)"}
    traced = hk.generate(
        unsure, [PROMPTS[0]], hk.force(7, margin=10.0), seed=0, trace=hk.trace(), **settings
    )
    why = hk.decisions(traced)
    pushes = why[why["token_id"] == 7]["why"].tolist()
    assert pushes and all(reason.startswith("drawn with p = ") for reason in pushes)


@pytest.mark.parametrize(
    "settings", [{}, {"num_return_sequences": 3}, {"do_sample": True, "temperature": 5.0}], ids=str
)
def test_a_forced_token_is_in_every_beam(unsure, settings):
    settings = {
        "num_beams": 3,
        "do_sample": False,
        "max_new_tokens": 4,
        "bad_words_ids": [[9]],
        **settings,
    }
    run = hk.generate(unsure, PROMPTS, hk.force(9, step=2), seed=0, **settings)
    assert {row[2] for row in written(run)} == {9}


def test_a_forced_token_is_taken_by_the_callers_own_generate(unsure):
    ids = torch.tensor([[5, 6, 7]])
    drawn = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 0,
        "num_return_sequences": 50,
        "max_new_tokens": 2,
        "min_new_tokens": 2,  # a text that ends before the forced step is padded with 0
    }
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **drawn}
    with hk.attach(unsure, hk.force(7, step=1)):
        assert set(unsure.model.generate(ids, **given)[:, 4].tolist()) == {7}
        inside = hk.generate(unsure, [[5, 6, 7]], hk.force(8, step=0), trace=hk.trace(), **drawn)
    assert written(inside) == [[8, 7]] * 50
    embeddings = unsure.model.get_input_embeddings()(ids)
    with hk.attach(unsure, hk.force(7)):
        assert set(unsure.model.generate(inputs_embeds=embeddings, **given).flatten().tolist()) == {
            7
        }
    assert len(set(unsure.model.generate(ids, **given)[:, 4].tolist())) > 10


class OnlyThese:
    """A logits processor of the caller's own."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = torch.full_like(scores, -math.inf)
        new[:, self.tokens] = scores[:, self.tokens]
        return new


def test_a_constraint_of_the_callers_own_that_leaves_the_token_out_is_a_contradiction(unsure):
    hook = hk.force(7, step=1)
    for given, name in [
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [8, 9]}, "prefix_allowed_tokens_fn"),
        ({"logits_processor": [OnlyThese(8, 9)]}, "the logits_processor OnlyThese"),
    ]:
        with pytest.raises(
            BadEdit,
            match=rf"force\(7, step=1\) decides on token 7 in row 0, and {name} leaves it out",
        ):
            hk.generate(unsure, PROMPTS, hook, max_new_tokens=2, **given)
    agreed = {
        "logits_processor": [OnlyThese(7, 8)],
        "suppress_tokens": [7],
        "do_sample": True,
        "top_k": 0,
    }
    assert [
        row[1] for row in written(hk.generate(unsure, PROMPTS, hook, max_new_tokens=2, **agreed))
    ] == [7, 7]


def test_the_later_hook_has_the_last_word(unsure):
    def first(*hooks: hk.types.Hook) -> list[int]:
        run = hk.generate(
            unsure, PROMPTS, *hooks, do_sample=True, temperature=0.1, seed=0, max_new_tokens=1
        )
        return [row[0] for row in written(run)]

    assert first(hk.force(7), hk.force(8)) == [8, 8]
    assert first(hk.ban(7), hk.force(7)) == [7, 7]
    assert first(hk.force(7), hk.restrict(8)) == [8, 8]
    assert 7 not in first(hk.force(7), hk.ban(7))
    assert (
        first(hk.force(7, when=hk.when.rank_of(7, at_least=2), rows=1), hk.boost(3, by=1.0))[1] == 7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_a_forward_the_logit_is_the_largest_plus_ten(dtype):
    lm = hk.LM(hk.tiny("llama").model.to(dtype))
    plain = lm.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    forced = hk.forward(lm, [[5, 6, 7]], hk.force(7)).logits[0, -1]
    assert forced[7] == plain.max() + 10.0
    assert hk.force(7).margin is None
    assert hk.types.Hook.from_json(hk.force(7).to_json()) == hk.force(7) != hk.force(7, margin=10.0)
    assert hk.parse_hook(hk.format_hook(hk.force(7, margin=10.0))) == hk.force(7, margin=10.0)
