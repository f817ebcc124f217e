"""The quality table: every number is that of a loop over the texts in plain transformers."""

from pathlib import Path

import pytest
import torch
from dictionaries import encode, random_weights, write

import hookkit as hk
from hookkit.errors import EmptySelection, OtherModel, Unsupported

TEXTS = [[(text * 11 + pos * 5) % 318 + 2 for pos in range(9 + text % 5)] for text in range(12)]
LOUD = 7  # a token whose value is an outlier


@pytest.fixture(scope="module")
def lm() -> hk.LM:
    lm = hk.tiny("llama")
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[LOUD] *= 1000
    return lm


def states_of(lm: hk.LM, ids: list[int], new: torch.Tensor | None = None, measured=None):
    """The loss of a text and the states after block 1, some of which are replaced."""
    seen = []

    def hook(module, given, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0].clone())
        if new is not None:
            hidden = hidden.clone()
            hidden[0, measured] = new
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = lm.model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        tokens = torch.tensor([ids])
        loss = lm.model(input_ids=tokens, labels=tokens).loss * (len(ids) - 1)
    handle.remove()
    return float(loss), seen[0]


def test_every_number_is_that_of_a_loop_in_plain_transformers(lm, tmp_path: Path):
    weights = random_weights("topk")
    dictionary = hk.load_dictionary(write(tmp_path, weights=weights))
    texts = [*TEXTS, [5, 6, LOUD, 8, 9]]
    clean = [states_of(lm, ids) for ids in texts]
    after_first = torch.cat([states[1:] for _, states in clean])
    limit = 10 * after_first.norm(dim=-1).sort().values[(len(after_first) - 1) // 2]
    masks = []
    for _, states in clean:
        mask = states.norm(dim=-1) <= limit
        mask[0] = False
        masks.append(mask)
    measured = torch.cat([states[mask] for (_, states), mask in zip(clean, masks, strict=True)])
    n_loud = sum(ids[1:].count(LOUD) for ids in texts)
    assert n_loud > 0 and len(measured) == len(after_first) - n_loud
    mean = measured.mean(0)
    features = encode(weights, measured, "topk")
    error = (measured - features @ weights["W_dec"] - weights["b_dec"]).square().sum()
    expected = {
        "fvu": error / (measured - mean).square().sum(),
        "l0": (features > 0).sum() / len(measured),
        "dead_share": (features == 0).all(0).float().mean(),
    }
    losses = {"clean": 0.0, "reconstruction": 0.0, "mean": 0.0, "zero": 0.0}
    for ids, (loss, states), mask in zip(texts, clean, masks, strict=True):
        codes = encode(weights, states[mask], "topk")
        decoded = codes @ weights["W_dec"] + weights["b_dec"]
        losses["clean"] += loss
        losses["reconstruction"] += states_of(lm, ids, decoded, mask)[0]
        losses["mean"] += states_of(lm, ids, mean, mask)[0]
        losses["zero"] += states_of(lm, ids, torch.zeros(32), mask)[0]
    predicted = sum(len(ids) - 1 for ids in texts)
    for name, loss in losses.items():
        expected[f"loss_{name}"] = loss / predicted
    for ending, name in (("", "zero"), ("_from_mean", "mean")):
        gain = losses[name] - losses["reconstruction"]
        expected[f"loss_recovered{ending}"] = gain / (losses[name] - losses["clean"])
    table = dictionary.quality(lm, texts, batch_tokens=40)
    assert (table["texts"] == len(texts)).all() and (table["tokens"] == len(measured)).all()
    values = table.set_index("measure")["value"]
    assert set(values.index) == set(expected)
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), rel=2e-4, abs=2e-4), name
    has_limits = table["low"].notna() & table["measure"].ne("loss_recovered_from_mean")
    assert (table["low"] <= table["value"])[has_limits].all() and has_limits.sum() >= 6


def test_a_dictionary_that_changes_nothing_recovers_the_whole_loss(lm, tmp_path: Path):
    plus = torch.cat([torch.eye(32), -torch.eye(32)])
    weights = {"W_enc": plus.T.contiguous(), "W_dec": plus, "b_dec": torch.zeros(32)}
    weights["b_enc"] = torch.zeros(64)
    dictionary = hk.load_dictionary(write(tmp_path, "standard", weights))
    values = dictionary.quality(lm, TEXTS).set_index("measure")["value"]
    assert values["fvu"] == pytest.approx(0, abs=1e-10)
    assert values["loss_reconstruction"] == pytest.approx(values["loss_clean"], abs=1e-5)
    assert values["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert values["l0"] == pytest.approx(32)


def test_texts_and_models_that_have_no_quality_are_refused(lm, tmp_path: Path):
    dictionary = hk.load_dictionary(write(tmp_path))
    with pytest.raises(EmptySelection, match="at least two"):
        dictionary.quality(lm, [[5]])
    with pytest.raises(OtherModel, match="32 numbers"):
        dictionary.quality(hk.tiny("llama", config={"hidden_size": 64}), TEXTS)
    with pytest.raises(Unsupported, match="masked"):
        dictionary.quality(hk.tiny("bert"), TEXTS)
    cut = dictionary.quality(hk.tiny("llama"), TEXTS, context=5)
    assert (cut["tokens"] == 4 * len(TEXTS)).all()
