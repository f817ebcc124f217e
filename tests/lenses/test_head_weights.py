"""OV and QK circuits against the dense products of the weights, by transformers' own modules."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hookkit as hk
from hookkit.errors import MissingSite, OutOfRange, Unsupported
from hookkit.lenses.head_weights import fold


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def varied(family):
    """A tiny model whose norms and biases are not ones and zeros."""
    lm = hk.tiny(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lm.model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return lm


def llama_like(lm, layer, head):
    """The tokens' queries, keys and values, and the output matrix, of a head of a Llama."""
    model, attention = lm.model.model, lm.model.model.layers[layer].self_attn
    config = lm.model.config
    size = attention.head_dim
    kv = head * config.num_key_value_heads // config.num_attention_heads
    with torch.no_grad():
        scale = config.hidden_size**0.5 if "Gemma" in type(model).__name__ else 1.0
        read = model.layers[layer].input_layernorm(model.embed_tokens.weight * scale)
        query = attention.q_proj(read)[:, head * size : (head + 1) * size]
        key = attention.k_proj(read)[:, kv * size : (kv + 1) * size]
        value = attention.v_proj(read)[:, kv * size : (kv + 1) * size]
        output = attention.o_proj.weight[:, head * size : (head + 1) * size]
    return query, key, value, output


@pytest.mark.parametrize(("family", "head"), [("llama", 3), ("qwen2", 1), ("gemma", 2)])
def test_an_ov_circuit_is_the_dense_product_with_biases_groups_and_the_norms_weights(family, head):
    lm = varied(family)
    _, _, value, output = llama_like(lm, 1, head)
    gain = lm.model.model.norm.weight + (1.0 if family == "gemma" else 0.0)
    with torch.no_grad():
        dense = value @ output.T @ torch.diag(gain) @ lm.model.lm_head.weight.T
    circuit = hk.ov(lm, 1, head)
    for token in (3, 50, 211):
        assert torch.allclose(circuit.logits(token), dense[token], rtol=1e-3, atol=1e-4)
    top = circuit.top(50, 5)
    assert top["token_id"].tolist() == dense[50].topk(5).indices.tolist()
    assert np.allclose(top["logit"], dense[50].topk(5).values, rtol=1e-3)
    bottom = circuit.top(50, 2, largest=False)
    assert bottom["token_id"].tolist() == dense[50].topk(2, largest=False).indices.tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_eigenvalues_are_those_of_the_matrix_of_all_tokens_without_biases(family):
    lm = varied(family)
    _, _, value, output = llama_like(lm, 0, 2)
    bias = lm.model.model.layers[0].self_attn.v_proj.bias
    with torch.no_grad():
        if bias is not None:
            value = value - bias[8:16]
        gain = torch.diag(lm.model.model.norm.weight)
        dense = (value @ output.T @ gain @ lm.model.lm_head.weight.T).double()
    eigenvalues = np.linalg.eigvals(dense.numpy())
    largest = eigenvalues[np.argsort(-abs(eigenvalues))][:8]
    circuit = hk.ov(lm, 0, 2)
    assert np.allclose(
        np.sort_complex(circuit.eigenvalues.numpy()), np.sort_complex(largest), atol=1e-4
    )
    assert circuit.copying == pytest.approx(
        float(largest.real.sum() / abs(largest).sum()), abs=1e-4
    )
    assert circuit.positive == (largest.real > 0).mean()


def test_an_ov_circuit_of_block_0_is_what_the_model_adds_to_its_logits():
    """With one token a head attends to it alone; LayerNorm, biases and Conv1D of GPT-2."""
    lm = varied("gpt2")
    model, token = lm.model.transformer, 77
    with torch.no_grad():
        model.wpe.weight.zero_()
        parts = sum(hk.ov(lm, 0, head).logits(token) for head in range(4))
        block = model.h[0]
        added = block.attn(block.ln_1(model.wte.weight[token][None, None]))[0][0, 0]
        added = added - block.attn.c_proj.bias
        centred = (added - added.mean()) * model.ln_f.weight
        expected = lm.model.lm_head.weight @ centred
    assert torch.allclose(parts, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distance", [0, 1, 5])
def test_a_qk_circuit_has_the_scores_at_a_distance_with_the_rotation_of_transformers(distance):
    lm = varied("qwen2")
    query, key, _, _ = llama_like(lm, 0, 3)
    cos, sin = lm.model.model.rotary_emb(query, torch.tensor([[0, distance]]))
    zero = torch.zeros_like(query)
    turned, _ = apply_rotary_pos_emb(query[None, None], zero[None, None], cos[:, 1:], sin[:, 1:])
    _, still = apply_rotary_pos_emb(zero[None, None], key[None, None], cos[:, :1], sin[:, :1])
    dense = turned[0, 0] @ still[0, 0].T * lm.model.model.layers[0].self_attn.scaling
    circuit = hk.qk(lm, 0, 3, distance=distance)
    for token in (3, 50, 211):
        assert torch.allclose(circuit.scores(token), dense[token], rtol=1e-3, atol=1e-4)
    assert circuit.top(50, 4)["token_id"].tolist() == dense[50].topk(4).indices.tolist()


def test_a_qk_circuit_has_the_scores_that_a_forward_computes():
    lm, ids = hk.tiny("llama"), [20, 7, 99, 41]
    scores = hk.forward(lm, ids, hk.capture("scores.0.1"))["scores.0.1"][0]
    for distance in (0, 2):
        circuit = hk.qk(lm, 0, 1, distance=distance)
        for query in range(distance, 4):
            expected = float(scores[query, query - distance])
            assert float(circuit.scores(ids[query])[ids[query - distance]]) == pytest.approx(
                expected, abs=1e-4
            )


def test_composition_scores_are_those_of_the_dense_matrices_of_both_heads():
    lm = varied("llama")
    model = lm.model.model
    size = model.layers[0].self_attn.head_dim

    def matrices(layer, head):
        attention, gain = (
            model.layers[layer].self_attn,
            torch.diag(model.layers[layer].input_layernorm.weight),
        )
        kv = head // 2
        rows, kv_rows = slice(head * size, (head + 1) * size), slice(kv * size, (kv + 1) * size)
        query, key = attention.q_proj.weight[rows] @ gain, attention.k_proj.weight[kv_rows] @ gain
        writes = attention.o_proj.weight[:, rows] @ attention.v_proj.weight[kv_rows] @ gain
        return query.T @ key, writes

    table = hk.ov(lm, 0, 3).composition(2, draws=200)
    assert list(table) == ["kind", "layer", "head", "score", "random", "random_low", "random_high"]
    assert len(table) == 12 and set(table["layer"]) == {2}
    with torch.no_grad():
        _, early = matrices(0, 3)
        for line in table.to_dict("records"):
            scores, writes = matrices(2, line["head"])
            product = {"q": scores.T @ early, "k": scores @ early, "v": writes @ early}[
                line["kind"]
            ]
            reader = writes if line["kind"] == "v" else scores
            expected = product.norm() / reader.norm() / early.norm()
            assert line["score"] == pytest.approx(float(expected), rel=1e-3)
            assert line["random_low"] < line["random"] < line["random_high"]
    assert table["random"][0] == pytest.approx(32**-0.5)


def test_a_planted_head_composes_with_the_one_that_reads_what_it_writes():
    lm = hk.tiny("llama")
    first, later = (lm.model.model.layers[layer].self_attn for layer in (0, 2))
    with torch.no_grad():  # key head 1, of heads 2 and 3, reads what head 0 writes
        later.k_proj.weight[8:16] = first.o_proj.weight[:, :8].T
    table = hk.ov(lm, 0, 0).composition(2).set_index(["kind", "head"])
    for head in (2, 3):
        line = table.loc[("k", head)]
        assert line["score"] > 1.3 * line["random_high"]
    assert all(table.loc["k"]["score"][:2] < table.loc["k"]["score"][2:].min())


def test_a_norm_is_folded_and_what_is_no_norm_is_refused():
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    layer_norm, linear = torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)
    with torch.no_grad():
        layer_norm.weight.normal_()
        centred = torch.eye(16) - 1 / 16
        assert torch.allclose(fold(layer_norm, states), centred * layer_norm.weight, atol=1e-4)
        assert torch.allclose(fold(linear, states), linear.weight.T, atol=1e-4)
    with pytest.raises(Unsupported, match="neither a LayerNorm"):
        fold(torch.tanh, states)


REFUSED = {
    "hk.ov(hk.tiny('gemma2'), 0, 0)": (Unsupported, "a norm after it"),
    "hk.ov(hk.tiny('olmo2'), 0, 0)": (Unsupported, "a norm after it"),
    "hk.qk(hk.tiny('gemma2'), 0, 0)": (Unsupported, "soft-cap"),
    "hk.qk(hk.tiny('qwen3'), 0, 0)": (Unsupported, "normalised"),
    "hk.qk(hk.tiny('bloom'), 0, 0, distance=2)": (Unsupported, "bias"),
    "hk.qk(hk.tiny('gptj'), 0, 0, distance=2)": (Unsupported, "other code"),
    "hk.ov(hk.tiny('deepseek_v3'), 0, 0)": (MissingSite, "latent"),
    "hk.ov(hk.tiny('llama'), 0, 4)": (OutOfRange, "head"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_weights_do_not_say_is_refused_with_the_reason(call):
    error, words = REFUSED[call]
    with pytest.raises(error, match=words):
        eval(call, {"hk": hk})


def test_a_gate_on_what_a_head_writes_is_refused():
    lm = hk.tiny("llama")
    handle = lm.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5,)
    )
    with pytest.raises(Unsupported, match=r"pattern times the values|output projection"):
        hk.ov(lm, 0, 0)
    handle.remove()
