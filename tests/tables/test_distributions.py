"""What follows from logits, against closed forms and scipy-free definitions written out."""

import math

import pytest
import torch

import hookkit as hk
from hookkit.models.next_token import divergences
from hookkit.tables.distributions import Distribution, distributions


def said(lm: hk.LM, probs: list[float]) -> Distribution:
    return Distribution(
        lm, {"row": 0, "pos": 0}, torch.tensor(probs, dtype=torch.float64).log().float()
    )


@pytest.fixture(scope="module")
def four():
    from conftest import tiny

    return hk.LM(tiny("llama"))


def test_an_even_choice_has_the_entropy_of_its_number_and_no_varentropy(four):
    even = said(four, [0.25] * 4)
    assert even.entropy == pytest.approx(math.log(4))
    assert even.varentropy == pytest.approx(0, abs=1e-9)
    assert even.margin == pytest.approx(0)
    assert even.ranks(torch.arange(4)).tolist() == [1, 1, 1, 1]
    assert even.top(2) == [0, 1]


def test_entropy_and_varentropy_are_their_definitions(four):
    probs = [0.5, 0.3, 0.15, 0.05]
    one = said(four, probs)
    entropy = -sum(p * math.log(p) for p in probs)
    assert one.entropy == pytest.approx(entropy, rel=1e-6)
    assert one.varentropy == pytest.approx(
        sum(p * (-math.log(p) - entropy) ** 2 for p in probs), rel=1e-6
    )
    assert one.margin == pytest.approx(math.log(0.5 / 0.3), rel=1e-6)


def test_a_banned_token_has_no_part_in_any_sum(four):
    banned = said(four, [0.5, 0.5, 0.0, 0.0])
    assert banned.entropy == pytest.approx(math.log(2))
    assert banned.ranks(torch.tensor([2, 3])).tolist() == [3, 3]
    assert said(four, [1.0, 0.0, 0.0, 0.0]).margin == math.inf


def test_divergences_are_their_definitions_and_infinite_where_a_token_was_banned(four):
    p, q = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]
    found = divergences(said(four, p).exact, said(four, q).exact)
    assert found["kl"] == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5
    )
    assert found["kl_reverse"] == pytest.approx(
        sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)), rel=1e-5
    )
    assert found["tv"] == pytest.approx(
        sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2, rel=1e-5
    )
    banned = divergences(said(four, p).exact, said(four, [0.6, 0.4, 0.0, 0.0]).exact)
    assert banned["kl"] == math.inf and math.isfinite(banned["kl_reverse"])
    apart = divergences(said(four, [1.0, 0, 0, 0]).exact, said(four, [0, 1.0, 0, 0]).exact)
    assert apart["js"] == pytest.approx(math.log(2)) and apart["tv"] == pytest.approx(1)


def test_rows_of_the_vocabulary_that_are_no_token_take_part_in_the_softmax_and_not_in_the_ranks(
    llama,
):
    run = hk.forward(llama, "Tea")
    one = next(distributions(run))
    assert torch.equal(one.logprobs, run.logits[0, 0].log_softmax(-1))
    assert len(one.real) == llama.n_tokens <= len(one.logits)


def test_a_model_in_half_precision_has_probabilities_in_whole_precision():
    lm = hk.LM(hk.tiny("llama").model.bfloat16())
    run = hk.forward(lm, [5, 6, 7])
    with torch.no_grad():
        logits = lm.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    table = hk.ranks(run, top=5)
    logprobs = logits.float().log_softmax(-1)
    assert table["logprob"].tolist() == pytest.approx(
        logprobs[table["token_id"].tolist()].tolist(), abs=1e-6
    )
    assert table["prob"].tolist() == pytest.approx(
        logprobs.exp()[table["token_id"].tolist()].tolist(), rel=1e-5
    )
    assert table["logit"].tolist() == logits.float()[table["token_id"].tolist()].tolist()
