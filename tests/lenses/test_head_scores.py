"""Head scores against attention of plain transformers, and planted heads that they have to find."""

import numpy as np
import pytest
import torch

import hookkit as hk

COLUMNS = ["layer", "head", "score", "value", "low", "high", "baseline", "n"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_attention_scores_are_means_of_transformers_own_attention():
    lm, length = hk.tiny("llama"), 6
    table = hk.head_scores(lm, n=4, length=length, seed=2)
    assert list(table) == COLUMNS and len(table) == 3 * 4 * 4
    lm.model.set_attn_implementation("eager")
    rows = torch.tensor(hk.datasets.induction(lm, 4, length=length, seed=2).clean)
    with torch.no_grad():
        attentions = lm.model(rows, output_attentions=True).attentions
    lm.model.set_attn_implementation("sdpa")
    first = rows.shape[1] - (2 * length - 1)
    offsets = {"previous_token": (1, first + 1), "duplicate_token": (length, first + length)}
    offsets["induction"] = (length - 1, first + length)
    for line in table[table["score"] != "copy_suppression"].to_dict("records"):
        offset, start = offsets[line["score"]]
        pattern = attentions[line["layer"]][:, line["head"]]
        queries = range(start, rows.shape[1])
        expected = np.mean([[float(row[q, q - offset]) for q in queries] for row in pattern])
        assert line["value"] == pytest.approx(expected, abs=1e-5)
        assert line["low"] <= line["value"] <= line["high"] and line["n"] == 4
        assert line["baseline"] == pytest.approx(np.mean([1 / (q + 1) for q in queries]))


def test_copy_suppression_is_what_each_key_takes_from_its_own_logit():
    lm = hk.tiny("llama")
    ids = [[5, 90, 31, 90, 17], [44, 12, 60]]
    table = hk.head_scores(lm, scores=["copy_suppression"], prompts=ids)
    model = lm.model.model
    lm.model.set_attn_implementation("eager")
    for layer, head in ((0, 1), (2, 3)):
        expected = []
        for row in ids:
            with torch.no_grad():
                output = lm.model(
                    torch.tensor([row]), output_attentions=True, output_hidden_states=True
                )
                last = hk.forward(lm, [row], hk.capture("resid_post.2", pos=-1))["resid_post.2"]
                block = model.layers[layer]
                values = block.self_attn.v_proj(block.input_layernorm(output.hidden_states[layer]))[
                    0
                ]
                kv = head // 2
                written = (
                    values[:, kv * 8 : kv * 8 + 8]
                    @ block.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8].T
                )
                scale = (last[0, 0].square().mean() + 1e-6).sqrt()
                logits = (written * model.norm.weight / scale) @ lm.model.lm_head.weight.T
                pattern = output.attentions[layer][0, head, -1]
            total = 0.0
            for key in range(len(row) - 1):
                others = [other for other in row[:-1] if other != row[key]]
                own = float(logits[key, row[key]]) - float(logits[key, others].mean())
                total -= float(pattern[key]) * own
            expected.append(total)
        line = table.query(f"layer == {layer} and head == {head}").iloc[0]
        assert line["value"] == pytest.approx(np.mean(expected), abs=1e-4)


def attend(offset):
    """A pattern in which every query attends to the key `offset` before it, or to the first."""

    def fn(pattern):
        new = torch.zeros_like(pattern)
        queries = torch.arange(pattern.shape[-2])
        new[..., queries, (queries - offset).clamp(min=0)] = 1
        return new

    return fn


def test_planted_heads_are_found_and_no_others(llama):
    length = 10
    hooks = [
        hk.edit("pattern.0.2", attend(1)),
        hk.edit("pattern.1.0", attend(length)),
        hk.edit("pattern.2.3", attend(length - 1)),
    ]
    with hk.attach(llama, *hooks):
        table = hk.head_scores(
            llama, scores=["previous_token", "duplicate_token", "induction"], n=4, length=length
        )
    places = {"previous_token": (0, 2), "duplicate_token": (1, 0), "induction": (2, 3)}
    for name, place in places.items():
        values = table[table["score"] == name].set_index(["layer", "head"])["value"]
        assert values.idxmax() == place and values[place] == pytest.approx(1.0)
        assert values.drop(place).max() < 0.6


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_copying_head_and_a_suppressing_one_are_told_apart(sign):
    lm = hk.tiny("llama")
    model = lm.model.model
    attention = model.layers[1].self_attn
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        lm.model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.clone())
        attention.o_proj.weight[:, 8:16] = sign * attention.v_proj.weight[:8].T
    assert hk.ov(lm, 1, 1).copying == pytest.approx(sign, abs=1e-3)
    assert hk.ov(lm, 1, 1).positive == (1.0 if sign > 0 else 0.0)
    table = hk.head_scores(lm, scores=["copy_suppression"], n=6, length=8).set_index(
        ["layer", "head"]
    )
    planted = table.loc[(1, 1)]
    assert planted["value"] * sign < 0 and (planted["high"] < 0 or planted["low"] > 0)
    assert (table.drop((1, 1))["value"] == 0).all()


def test_the_table_is_drawn_by_the_heat_map_and_the_same_call_gives_the_same_numbers(llama):
    table = hk.head_scores(llama, scores=["induction"], n=3, length=6)
    assert table.equals(hk.head_scores(llama, scores=["induction"], n=3, length=6))
    figure = hk.figures.heat_map(table, value="value", x="head")
    assert figure.axes[0].get_xlabel() == "head"


def test_latent_attention_has_the_scores_of_attention():
    table = hk.head_scores(hk.tiny("deepseek_v3"), scores=["induction"], n=3, length=6)
    assert set(table["layer"]) == {0, 1, 2}


@pytest.mark.slow
def test_the_default_model_has_induction_heads():
    table = hk.head_scores(hk.load(), scores=["induction", "previous_token"], n=8)
    best = table.query("score == 'induction'").nlargest(3, "value")
    assert best["low"].min() > 0.5 and best["baseline"].max() < 0.05
