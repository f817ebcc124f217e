"""knockout: attention from some tokens to others is cut, and the rest renormalised."""

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadEdit, EmptySelection, OutOfRange, UnknownKeyword

IDS = [5, 9, 17, 200, 33, 41, 7]


def masked_by_hand(
    model: torch.nn.Module, ids: list[int], pairs: list[tuple[int, int]]
) -> torch.Tensor:
    """Plain transformers with a mask of its own: [1, 1, query, key], true for what is seen."""
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for query, key in pairs:
        seen[query, key] = False
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=seen[None, None]).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral", "deepseek_v3"])
def test_a_knockout_in_every_layer_is_a_mask_of_plain_transformers(family):
    lm = hk.tiny(family)
    found = hk.forward(lm, [IDS], hk.knockout(range(3), query=[4, -1], key=slice(1, 3)))
    expected = masked_by_hand(lm.model, IDS, [(query, key) for query in (4, 6) for key in (1, 2)])
    torch.testing.assert_close(found.logits, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found.logits, hk.forward(lm, [IDS]).logits, atol=1e-2)


def test_what_is_left_of_a_pattern_is_renormalised(llama):
    before = hk.forward(llama, [IDS], hk.capture("pattern.1"))["pattern.1"]
    cut = hk.forward(
        llama, [IDS], hk.knockout(1, 2, query=-1, key=[0, 3]), hk.capture("pattern.1")
    )["pattern.1"]
    expected = before.clone()
    expected[0, 2, 6, [0, 3]] = 0
    expected[0, 2, 6] /= expected[0, 2, 6].sum()
    torch.testing.assert_close(cut, expected, atol=1e-6, rtol=1e-5)


def test_rows_are_cut_at_their_own_positions_whatever_the_padding(llama):
    prompts = ["When Mary and John went to the store, John gave a drink to", "I like Mary"]
    hook = hk.knockout([0, 1], query=-1, key=hk.at("Mary"))
    together = hk.forward(llama, prompts, hook)
    for row, prompt in enumerate(prompts):
        alone = hk.forward(llama, prompt, hook)
        torch.testing.assert_close(
            together.logits[row, : alone.lengths[0]], alone.logits[0], atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize(
    "way", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]
)
def test_generated_tokens_do_not_see_what_is_cut_off_with_any_cache(llama, way):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **way}
    run = hk.generate(
        llama,
        [IDS, IDS[:3]],
        hk.knockout(range(3), query=hk.GENERATED, key=slice(0, 2)),
        **settings,
    )
    for row, length in enumerate(run.lengths):
        ids, start = run.tokens[row, : length - 1].tolist(), run.prompt_lengths[row]
        pairs = [(query, key) for query in range(start, len(ids)) for key in (0, 1)]
        expected = masked_by_hand(llama.model, ids, pairs)
        torch.testing.assert_close(run.logits[row], expected[0, start - 1 :], atol=1e-4, rtol=1e-4)


def test_a_query_that_would_see_nothing_is_refused(llama):
    with pytest.raises(
        BadEdit,
        match=r"leaves the query at position 0 of row 0 nothing to see: .* query=slice\(1, None\)",
    ):
        hk.forward(llama, [IDS], hk.knockout(1, key=0))
    hk.forward(llama, [IDS], hk.knockout(1, query=slice(1, None), key=0))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hk.knockout(1, key=None), EmptySelection, "needs the keys"),
        (lambda: hk.knockout([], key=0), EmptySelection, "selects nothing"),
        (lambda: hk.knockout(1, 2, keys=0), UnknownKeyword, "did you mean 'key'"),
    ],
)
def test_a_knockout_that_cannot_be_meant_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_key_that_is_not_there_is_refused(llama):
    with pytest.raises(OutOfRange, match="the key at position 40 of row 0, which has 7 tokens"):
        hk.forward(llama, [IDS], hk.knockout(1, query=-1, key=40))
    with pytest.raises(OutOfRange, match="layers"):
        hk.forward(llama, [IDS], hk.knockout(9, query=-1, key=0))


@pytest.mark.parametrize(
    "hook",
    [
        hk.knockout(1, 2, query=-1, key=0),
        hk.knockout([1, 2], [0, 3], query=hk.at("Mary"), key=slice(0, 4), rows=0),
        hk.knockout(0, query=hk.GENERATED, key=hk.PROMPT),
    ],
    ids=str,
)
def test_a_knockout_comes_back_from_json_and_prints_as_its_call(hook):
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook and str(again) == str(hook)
    assert str(hook).startswith("knockout(")


def test_a_knockout_prints_the_call_that_makes_it():
    assert (
        str(hk.knockout([1, 2], 0, query=-1, key=[0, 3]))
        == "knockout([1, 2], 0, query=-1, key=(0, 3))"
    )
