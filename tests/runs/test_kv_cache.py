"""Decoding by hand with caches of every kind: whose text a forward goes on from, and what a hook still reaches."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hookkit as hk
from hookkit.errors import HookkitError, OutOfRange, Unsupported
from hookkit.runs.tracking import cache_of

SITE = "resid_post.1"
ROW, OTHER = [5, 9, 13, 17, 21], [11, 12, 14, 15, 16]
VECTOR = torch.linspace(-3, 3, 32)
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ids_of(*rows):
    return torch.tensor(rows)


def filled(model, row):
    cache = DynamicCache()
    model(ids_of(row), past_key_values=cache, use_cache=True)
    return cache


def by_hand(model, row, positions):
    """Logits [pos, vocab] of a whole text, with the vector added at these positions behind block 1."""

    def add(_module, _args, output):
        new = output.clone()
        new[:, positions] += VECTOR
        return new

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[1].register_forward_hook(add)
    try:
        return model(ids_of(row)).logits[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("pos", [[0, 4], hk.PROMPT, slice(2, None), None], ids=str)
def test_an_edit_of_positions_that_a_cache_has_is_refused_in_generate(lm, pos):
    hook = hk.steer(SITE, VECTOR, pos=pos)
    with pytest.raises(
        (OutOfRange, Unsupported), match="continues a cache that has columns 0 to 2"
    ):
        hk.generate(lm, [ROW], hook, past_key_values=filled(lm.model, ROW[:3]), **GREEDY)


def test_an_edit_of_positions_that_are_read_takes_effect(lm):
    hook = hk.steer(SITE, VECTOR, pos=slice(3, None))
    some = hk.generate(lm, [ROW], hook, past_key_values=filled(lm.model, ROW[:3]), **GREEDY)
    whole = hk.generate(lm, [ROW], hook, **GREEDY)
    assert torch.allclose(some.logits, whole.logits, atol=1e-4)


def test_a_cache_that_was_filled_under_the_same_hook_may_be_gone_on_from(lm):
    hook = hk.steer(SITE, VECTOR)
    with hk.attach(lm, hook) as manager:
        cache = filled(lm.model, ROW[:3])
        tokens = lm.model.generate(ids_of(ROW), past_key_values=cache, **GREEDY)
    assert tokens[0].tolist() == hk.generate(lm, [ROW], hook, **GREEDY).tokens[0].tolist()
    assert manager.log["positions"].tolist() == ["0-2", "3-4", "5", "6"]


def test_a_position_counted_from_the_end_means_the_prompt_that_is_read_and_not_its_prefix(lm):
    with (
        pytest.raises(OutOfRange, match="means position 2"),
        hk.attach(lm, hk.steer(SITE, VECTOR, pos=-3)),
    ):
        lm.model.generate(ids_of(ROW), past_key_values=filled(lm.model, ROW[:3]), **GREEDY)


def test_two_texts_decoded_in_turns_are_told_apart_by_their_caches(lm):
    model = lm.model
    hook = hk.steer(SITE, VECTOR, pos=-1)
    texts, logits = [list(ROW), list(OTHER)], [[], []]
    with hk.attach(lm, hk.capture(SITE), hook) as manager:
        outputs = [model(ids_of(text), use_cache=True) for text in texts]
        for token in (20, 22, 24):
            for number in (1, 0):
                outputs[number] = model(
                    ids_of([token + number]),
                    past_key_values=outputs[number].past_key_values,
                    use_cache=True,
                )
                texts[number].append(token + number)
                logits[number].append(outputs[number].logits[0, -1])
    for number, text in enumerate(texts):
        expected = by_hand(model, text, [4])
        assert torch.allclose(torch.stack(logits[number]), expected[5:], atol=1e-4)
        kept = manager.texts[number].captured(SITE)
        assert kept.positions.tolist() == [list(range(8))]
        assert kept.prompts == (tuple(text[:5]),)


def test_a_prefix_that_is_gone_on_from_twice_gives_the_same_twice(lm):
    model, hook = lm.model, hk.steer(SITE, VECTOR, pos=slice(2, 6))
    with hk.attach(lm, hook) as manager:
        prefix = model(ids_of(ROW), use_cache=True).past_key_values
        results = [
            model(ids_of([21, 30, 31]), past_key_values=copy.deepcopy(prefix)).logits[0]
            for _ in range(2)
        ]
    expected = by_hand(model, [*ROW, 21, 30, 31], [2, 3, 4, 5])[5:]
    for found in results:
        assert torch.allclose(found, expected, atol=1e-4)
    assert manager.log["positions"].tolist() == ["2-4", "5", "5"]


def test_a_cache_that_was_cut_back_goes_on_where_it_was_cut(lm):
    model = lm.model
    with hk.attach(lm, hk.capture(SITE), hk.steer(SITE, VECTOR, pos=6)) as manager:
        cache = DynamicCache()
        model(ids_of(ROW), past_key_values=cache, use_cache=True)
        model(ids_of([20, 21, 22]), past_key_values=cache, use_cache=True)
        cache.crop(-2)
        found = model(ids_of([30, 31]), past_key_values=cache, use_cache=True).logits[0]
    assert torch.allclose(found, by_hand(model, [*ROW, 20, 30, 31], [6])[6:], atol=1e-4)
    assert [text.captured(SITE).positions.tolist() for text in manager.texts] == [
        [list(range(8))],
        [[6, 7]],
    ]


def test_rows_that_were_put_in_another_order_are_refused(lm):
    with (
        pytest.raises(Unsupported, match="other rows than the last forward left"),
        hk.attach(lm, hk.capture(SITE)),
    ):
        cache = DynamicCache()
        lm.model(ids_of(ROW, OTHER), past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        lm.model(ids_of([20], [21]), past_key_values=cache, use_cache=True)


def test_a_state_of_unknown_length_is_refused_and_two_of_them_are_kept_apart():
    lm = hk.tiny("mamba")
    model = lm.model
    outside = model(ids_of(ROW), use_cache=True).cache_params
    with (
        pytest.raises(Unsupported, match="does not say how many tokens"),
        hk.attach(lm, hk.capture(SITE)),
    ):
        model(ids_of([20]), cache_params=outside, use_cache=True)
    with hk.attach(lm, hk.capture(SITE)) as manager:
        states = [model(ids_of(row), use_cache=True).cache_params for row in (ROW, OTHER[:3])]
        for number in (1, 0):
            model(ids_of([20 + number]), cache_params=states[number], use_cache=True)
    assert [text.captured(SITE).positions.tolist() for text in manager.texts] == [
        [list(range(6))],
        [list(range(4))],
    ]
    whole = hk.forward(lm, [[*ROW, 20]], hk.capture(SITE))[SITE]
    assert torch.allclose(manager.texts[0][SITE], whole, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "mistral", "gemma2", "qwen3_next", "lfm2", "bloom", "deepseek_v3"]
)
def test_random_decoding_loops_have_the_numbers_of_the_whole_text(family):
    lm = hk.tiny(family)
    for seed in range(3):
        random_loop(lm, seed)


def random_loop(lm, seed):
    """Two texts, each read in random pieces in turns, with an edit: every logit is that of the whole text."""
    draw = random.Random(seed)
    model = lm.model
    static = draw.random() < 0.3 and lm.config.model_type in ("llama", "gpt2", "mistral")
    texts = [[draw.randrange(3, 300) for _ in range(draw.randrange(6, 12))] for _ in range(2)]
    first = [draw.randrange(1, 5) for _ in texts]
    place = draw.randrange(0, 5)
    hook = hk.scale(SITE, -0.5, pos=slice(place, None, draw.choice([1, 2])))
    caches = [StaticCache(config=model.config, max_cache_len=32) if static else None for _ in texts]
    done, logits = [0, 0], [[], []]
    try:
        with hk.attach(lm, hk.capture(SITE), hook) as manager:
            while any(done[n] < len(text) for n, text in enumerate(texts)):
                number = draw.choice([n for n, text in enumerate(texts) if done[n] < len(text)])
                width = first[number] if not done[number] else draw.choice([1, 1, 2, 3])
                piece = texts[number][done[number] : done[number] + width]
                output = model(ids_of(piece), past_key_values=caches[number], use_cache=True)
                caches[number] = output.past_key_values
                done[number] += len(piece)
                logits[number].append(output.logits[0])
    except HookkitError as error:
        raise AssertionError(f"{lm}, seed {seed}") from error
    for number, text in enumerate(texts):
        whole = hk.forward(lm, [text], hk.capture(SITE), hook)
        tolerance = 1e-3 * float(whole.logits.abs().max())
        assert torch.allclose(torch.cat(logits[number]), whole.logits[0], atol=tolerance), (
            lm,
            seed,
        )
        began = [text.captured(SITE) for text in manager.texts]
        kept = next(each for each in began if each.prompts[0] == tuple(text[: first[number]]))
        assert kept.positions.tolist() == [list(range(len(text)))]
        assert torch.allclose(
            kept.values, whole[SITE], atol=1e-3 * float(whole[SITE].abs().max())
        ), (lm, seed)


def test_a_tuple_of_keys_and_values_in_a_models_output_is_its_cache():
    keys = torch.ones(1, 2, 3, 4)
    cache = ((keys, keys), (keys, keys))
    assert cache_of((torch.ones(1), cache)) is cache
