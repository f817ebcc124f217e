"""Where a logit comes from: sums that are exact, beside the weights of plain transformers."""

import by_hand_families
import pytest
import torch
from tiny_families import ONE_OF_EACH

import hookkit as hk

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
WITHOUT_HEADS = {"mamba", "mamba2"}


def uneven(family, **config):
    """A tiny model whose norms have gains, and biases where they have them, as trained ones do."""
    lm = hk.tiny(family, config=config) if config else hk.tiny(family)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lm.model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=draws)
    return lm


def assert_sums(table, logits, limit=1e-4):
    """The rows of each position, without what is left over, sum to the logit."""
    for (row, pos), part in table.groupby(["row", "pos"]):
        parts = part[part["kind"] != "residual"]
        assert parts["logit"].sum() == pytest.approx(float(logits[row, pos]), abs=limit)
        assert part["logit"].sum() == pytest.approx(float(logits[row, pos]), abs=1e-5)


ADDED_BESIDE = {  # what a family's blocks add beside attention and MLP, read from transformers' code
    "gemma4_text": {"rest.0", "rest.1", "rest.2"},
    **{kind: {"rest.0", "rest.1", "rest.2"} for kind in ("falcon_h1", "granitemoehybrid")},
    "mamba": {"block.0", "block.1", "block.2"},
    "mamba2": {"block.0", "block.1", "block.2"},
}


def assert_nothing_is_balanced(lm, table, token):
    """No row makes the sum come true: what is left over is rounding, and each other row is what the weights say."""
    family = lm.config.model_type
    for _, part in table.groupby(["row", "pos"]):
        sizes = part.set_index("component")["logit"].abs()
        assert sizes["residual"] <= 2e-6 * sizes.sum(), "more than float32 rounds"
    whole = table[
        ~table["kind"].isin(["embedding", "attention", "head", "mlp", "neuron", "residual"])
    ]
    rows = {name: part["logit"] for name, part in whole.groupby("component")}
    in_blocks = {
        name for name in rows if name.startswith(("attn_out", "mlp_out")) and name.endswith(" bias")
    }
    expected = set(ADDED_BESIDE.get(family, ()))
    names = by_hand_families.names_of(lm.config)
    norm, head = (
        lm.model.get_submodule(f"{names.body}.{names.final}"),
        lm.model.get_output_embeddings(),
    )
    biases = {
        "final_norm bias": getattr(norm, "bias", None),
        "lm_head bias": getattr(head, "bias", None),
    }
    if biases["final_norm bias"] is not None:
        biases["final_norm bias"] = head.weight @ biases["final_norm bias"]
    for name, bias in biases.items():
        if bias is not None:
            expected.add(name)
            share = float(bias[token].detach())
            assert rows[name].tolist() == pytest.approx([share] * len(rows[name]), abs=1e-5), name
    if getattr(lm.config, "final_logit_softcapping", None) is not None:
        expected.add("soft-cap")
    assert set(rows) - in_blocks == expected


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_the_sum_is_the_logit_in_every_family(family):
    lm = uneven(family)
    run = hk.forward(lm, IDS)
    table = hk.direct_logits(run, 7, pos=None)
    assert_sums(table, run.logits[..., 7])
    assert_nothing_is_balanced(lm, table, 7)
    left = table[table["kind"] == "residual"]["logit"].abs()
    assert table.attrs["residual"] == left.max(), "the largest of what is left over"
    assert_sums(
        hk.direct_logits(run, 7, against=9, pos=None), run.logits[..., 7] - run.logits[..., 9]
    )
    assert table.attrs["residual"] < 1e-4
    assert len(table.groupby(["row", "pos"])) == 9


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_heads_sum_to_attention_and_neurons_to_the_mlp_in_every_family(family):
    lm = uneven(family)
    run = hk.forward(lm, IDS)
    whole = hk.direct_logits(run, 7, pos=None).set_index(["row", "pos", "component"])["logit"]
    for split, site, name in (("heads", "z", "attn_out"), ("neurons", "mlp_post", "mlp_out")):
        if site not in lm.layout.names:
            with pytest.raises(hk.errors.MissingSite):
                hk.direct_logits(run, 7, **{split: True})
            continue
        layers = lm.layout.layers(site)
        if site == "mlp_post":  # neurons of experts are not split
            layers = [n for n in layers if "choice" not in lm.layout.axes(hk.Site(site, n))]
        if not layers:
            with pytest.raises(hk.errors.Unsupported, match="those of experts"):
                hk.direct_logits(run, 7, **{split: True})
            continue
        table = hk.direct_logits(run, 7, pos=None, **{split: True})
        assert_sums(table, run.logits[..., 7])
        assert_nothing_is_balanced(lm, table, 7)
        for layer in layers:
            of_layer = table[
                table["component"].str.match(rf"({site}\.{layer}\.|{name}\.{layer} bias)")
            ]
            sums = of_layer.groupby(["row", "pos"])["logit"].sum()
            assert len(of_layer) >= 9 * (lm.layout.shape(hk.Site(site, layer))[0])
            for (row, pos), found in sums.items():
                assert found == pytest.approx(whole[row, pos, f"{name}.{layer}"], abs=1e-4)


def added_by_hand(lm, ids):
    """What the embedding, attention and MLP of each block add, and the stream at the end, seen by hooks of torch."""
    llama = hasattr(lm.model, "model")
    layers = lm.model.model.layers if llama else lm.model.transformer.h
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0].detach()

        return hook

    handles = []
    for number, layer in enumerate(layers):
        handles.append(
            (layer.self_attn if llama else layer.attn).register_forward_hook(
                keep(f"attn_out.{number}")
            )
        )
        handles.append(layer.mlp.register_forward_hook(keep(f"mlp_out.{number}")))
        handles.append(layer.register_forward_hook(keep("end")))
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    end = seen.pop("end")
    seen["embed"] = end - sum(seen.values())
    return seen, end


@pytest.mark.parametrize(("epsilon", "gain"), [(1e-6, 1.0), (0.5, 1.0), (1e-6, 1e-5)])
def test_each_share_is_what_the_weights_say_for_llama(epsilon, gain):
    lm = uneven("llama", rms_norm_eps=epsilon)
    with torch.no_grad():
        lm.model.model.norm.weight *= gain
    added, end = added_by_hand(lm, IDS[0])
    table = hk.direct_logits(hk.forward(lm, IDS), 7, pos=1).set_index(["row", "component"])["logit"]
    norm, unembed = lm.model.model.norm, lm.model.lm_head.weight[7].detach()
    scale = torch.rsqrt(end[1].square().mean() + norm.variance_epsilon)
    for name, vector in added.items():
        share = float((vector[1] * scale * norm.weight.detach() * unembed).sum())
        assert table[0, name] == pytest.approx(share, abs=1e-5 * gain)


def test_a_linear_map_in_the_place_of_the_norm_is_split_as_the_weights_say():
    lm = uneven("llama")
    added, _ = added_by_hand(lm, IDS[0])
    lm.model.model.norm = torch.nn.Linear(32, 32)
    with torch.no_grad():
        lm.model.model.norm.weight += 0.3 * torch.randn(
            32, 32, generator=torch.Generator().manual_seed(2)
        )
    table = hk.direct_logits(hk.forward(lm, IDS), 7, pos=1).set_index(["row", "component"])["logit"]
    direction = lm.model.lm_head.weight[7].detach() @ lm.model.model.norm.weight.detach()
    for name, vector in added.items():
        assert table[0, name] == pytest.approx(float(vector[1] @ direction), abs=1e-5)


def test_each_share_is_what_the_weights_say_for_gpt2():
    lm = uneven("gpt2")
    added, end = added_by_hand(lm, IDS[0])
    table = hk.direct_logits(hk.forward(lm, IDS[0]), 7).set_index("component")["logit"]
    norm, unembed = lm.model.transformer.ln_f, lm.model.lm_head.weight[7].detach()
    deviation = torch.sqrt(end[-1].var(unbiased=False) + norm.eps)
    embedded = added.pop("embed")
    for name, vector in added.items():
        share = (
            (vector[-1] - vector[-1].mean()) / deviation * norm.weight.detach() * unembed
        ).sum()
        assert table[name] == pytest.approx(float(share), abs=1e-5)
    token, place = (
        lm.model.transformer.wte.weight[IDS[0][-1]].detach(),
        lm.model.transformer.wpe.weight[5].detach(),
    )
    assert torch.allclose(token + place, embedded[-1], atol=1e-5)
    for name, vector in (("embed", token), ("pos_embed", place)):
        share = ((vector - vector.mean()) / deviation * norm.weight.detach() * unembed).sum()
        assert table[name] == pytest.approx(float(share), abs=1e-5)
    assert table["final_norm bias"] == pytest.approx(float(norm.bias.detach() @ unembed), abs=1e-5)


def test_a_head_and_a_neuron_are_what_the_weights_say():
    lm = uneven("llama")
    run = hk.forward(lm, IDS[0], hk.capture(["z.1", "mlp_post.1", "resid_post.2"], pos=-1))
    norm, unembed = lm.model.model.norm, lm.model.lm_head.weight[7].detach()
    end = run["resid_post.2"][0, 0]
    direction = (
        unembed * norm.weight.detach() * torch.rsqrt(end.square().mean() + norm.variance_epsilon)
    )
    layer = lm.model.model.layers[1]
    heads = hk.direct_logits(run, 7, heads=True).set_index("component")["logit"]
    for head in range(4):
        columns = layer.self_attn.o_proj.weight.detach()[:, 8 * head : 8 * head + 8]
        assert heads[f"z.1.{head}"] == pytest.approx(
            float(direction @ columns @ run["z.1"][0, 0, head]), abs=1e-5
        )
    neurons = hk.direct_logits(run, 7, neurons=True).set_index("component")["logit"]
    for neuron in (0, 17, 47):
        share = (
            direction
            @ layer.mlp.down_proj.weight.detach()[:, neuron]
            * run["mlp_post.1"][0, 0, neuron]
        )
        assert neurons[f"mlp_post.1.{neuron}"] == pytest.approx(float(share), abs=1e-5)


def test_a_soft_cap_is_a_row_and_a_scale_is_in_every_row():
    capped = uneven("gemma2", final_logit_softcapping=1.0)
    run = hk.forward(capped, IDS)
    table = hk.direct_logits(run, 7)
    raw = hk.forward(capped, IDS, hk.capture("lm_head"))["lm_head"][0, 5, 7]
    found = table[(table["row"] == 0) & (table["component"] == "soft-cap")]["logit"].tolist()
    assert (
        found == pytest.approx([float(run.logits[0, 5, 7] - raw)], abs=1e-5)
        and abs(found[0]) > 0.01
    )
    scaled = uneven("cohere", logit_scale=0.25)
    parts = hk.direct_logits(hk.forward(scaled, IDS[0]), 7)
    scaled.model.logit_scale = 0.5
    doubled = hk.direct_logits(hk.forward(scaled, IDS[0]), 7)
    assert "soft-cap" not in parts["component"].tolist()
    assert doubled["logit"].tolist() == pytest.approx((2 * parts["logit"]).tolist(), abs=1e-5)


def test_edits_are_in_the_sum_where_they_are_made(llama):
    vector = torch.linspace(-1, 1, 32)
    hooks = hk.steer("resid_post.0", vector, pos=-1), hk.boost(7, by=3.0), hk.ablate("mlp_out.1")
    run = hk.forward(llama, IDS[0], *hooks)
    table = hk.direct_logits(run, 7).set_index("component")["logit"]
    assert table.sum() == pytest.approx(float(run.logits[0, -1, 7]), abs=1e-5)
    assert table["edits of the logits"] == pytest.approx(3.0, abs=1e-5)
    assert table["mlp_out.1"] == 0
    end = hk.forward(llama, IDS[0], *hooks, hk.capture("resid_post.2"))["resid_post.2"][0, -1]
    direction = (
        hk.unembedding(llama, 7)
        * torch.rsqrt(end.square().mean() + 1e-6)
        * llama.model.model.norm.weight
    )
    direction = direction.detach()
    steered = [name for name in table.index if name.startswith(("rest", "between"))]
    assert [table[name] for name in steered] == pytest.approx([float(direction @ vector)], abs=1e-4)


def test_a_list_has_a_token_for_each_row(llama):
    run = hk.forward(llama, IDS)
    table = hk.direct_logits(run, [7, 9], against=[3, 4])
    said = run.logits[0, 5, 7] - run.logits[0, 5, 3], run.logits[1, 2, 9] - run.logits[1, 2, 4]
    assert table.groupby("row")["logit"].sum().tolist() == pytest.approx(
        [float(each) for each in said], abs=1e-5
    )
    with pytest.raises(hk.errors.BadPrompt, match="1 tokens for 2 rows"):
        hk.direct_logits(run, [7])


def test_a_generated_text_is_read_again_but_not_with_edits_whose_positions_moved(llama):
    run = hk.generate(llama, IDS[0], max_new_tokens=3, do_sample=False)
    table = hk.direct_logits(run, 7)
    again = hk.forward(llama, run.tokens[0].tolist())
    assert table["logit"].sum() == pytest.approx(float(again.logits[0, -1, 7]), abs=1e-5)
    edited = hk.generate(llama, IDS[0], hk.ablate("z.0"), max_new_tokens=3, do_sample=False)
    with pytest.raises(hk.errors.Unsupported, match="positions count from the prompt's end"):
        hk.direct_logits(edited, 7)


def test_what_is_no_norm_is_not_split():
    lm = hk.tiny("llama")
    lm.model.model.norm = torch.nn.Sequential(lm.model.model.norm, torch.nn.Tanh())
    with pytest.raises(hk.errors.Unsupported, match="neither a LayerNorm, an RMSNorm nor linear"):
        hk.direct_logits(hk.forward(lm, IDS[0]), 7)


def test_the_terms_are_weight_times_hidden_and_sum_to_the_logit(llama):
    run = hk.forward(llama, IDS, hk.capture("final_norm"))
    for row, pos in ((0, 2), (1, -1)):
        terms = hk.logit_terms(run, 7, row=row, pos=pos, top=4)
        hidden = run["final_norm"][row, pos if pos >= 0 else len(IDS[row]) - 1]
        weight = llama.model.lm_head.weight[7].detach()
        order = (weight * hidden).abs().argsort(descending=True)[:4].tolist()
        assert terms["dim"][:4].tolist() == order
        assert terms["weight"][:4].tolist() == pytest.approx(weight[order].tolist(), abs=1e-6)
        assert terms["hidden"][:4].tolist() == pytest.approx(hidden[order].tolist(), abs=1e-5)
        said = float(run.logits[row, pos if pos >= 0 else len(IDS[row]) - 1, 7])
        assert terms["product"][:-1].sum() == pytest.approx(said, abs=1e-5)
        assert terms["term"].tolist()[-1] == "logit" and terms["product"].tolist()[
            -1
        ] == pytest.approx(said, abs=1e-5)
        assert terms["running"].tolist()[:-1] == pytest.approx(
            terms["product"][:-1].cumsum().tolist(), abs=1e-6
        )


def test_no_term_of_a_logit_only_balances_the_others():
    lm = uneven("gemma2", final_logit_softcapping=1.0)
    lm.model.lm_head.bias = torch.nn.Parameter(
        torch.linspace(-1, 1, lm.model.lm_head.weight.shape[0])
    )
    run = hk.forward(lm, IDS, hk.capture("final_norm"))
    terms = hk.logit_terms(run, 7, row=1, pos=1, top=4).set_index("term")
    hidden, weight = run["final_norm"][1, 1].double(), lm.model.lm_head.weight[7].detach().double()
    products, bias = weight * hidden, float(lm.model.lm_head.bias[7].detach())
    smaller = products.abs().sort().values[:-4].sum(), products[products.abs().argsort()[:-4]].sum()
    assert smaller[0] > 0.05
    assert terms.loc["others", "product"] == pytest.approx(float(smaller[1]), abs=1e-5)
    assert terms.loc["bias", "product"] == pytest.approx(bias, abs=1e-6) and abs(bias) > 0.5
    raw = float(products.sum()) + bias
    capped = terms.loc["soft-cap, scale or edit", "product"]
    assert (
        capped == pytest.approx(float(torch.tensor(raw).tanh()) - raw, abs=1e-5)
        and abs(capped) > 0.01
    )
    assert terms.loc["logit", "product"] == pytest.approx(float(torch.tensor(raw).tanh()), abs=1e-5)
    every = hk.logit_terms(run, 7, row=1, pos=1, top=32)
    assert every.set_index("term").loc["others", "product"] == pytest.approx(0, abs=1e-5), (
        "there are no others"
    )


def test_the_unembedding_is_the_heads_row_and_the_same_in_every_context(gpt2):
    found = hk.unembedding(gpt2, 7)
    assert torch.equal(found, gpt2.model.lm_head.weight[7])
    assert found.data_ptr() != gpt2.model.lm_head.weight[7].data_ptr()
    run = hk.forward(gpt2, IDS, hk.capture("final_norm"))
    assert torch.allclose(run["final_norm"][0] @ found, run.logits[0, :, 7], atol=1e-5)
    assert torch.allclose(run["final_norm"][1, :3] @ found, run.logits[1, :3, 7], atol=1e-5)


def test_the_unembedding_of_a_head_that_reads_fewer_numbers_is_as_long_as_they_are():
    lm = hk.tiny("opt", config={"word_embed_proj_dim": 16})
    assert (
        torch.equal(hk.unembedding(lm, 7), lm.model.lm_head.weight[7])
        and len(hk.unembedding(lm, 7)) == 16
    )


def test_the_path_goes_from_the_text_to_the_next_token(llama):
    path = hk.logit_path(llama, "I like oat milk in my")
    assert path["stage"].tolist() == [
        "text", "tokens", "embedding", "block 0", "block 1", "block 2", "final norm", "head", "logits",
        "probabilities", "next token",
    ]  # fmt: skip
    run = hk.forward(llama, "I like oat milk in my", hk.capture(["resid_post.1", "final_norm"]))
    width = len(run.tokens[0])
    shapes = path.set_index("stage")["shape"]
    assert shapes["block 1"] == f"[1, {width}, 32]" and shapes["logits"] == f"[1, {width}, 320]"
    norms = path.set_index("stage")["norm"]
    assert norms["block 1"] == pytest.approx(float(run["resid_post.1"][0, -1].norm()), rel=1e-5)
    best = int(run.logits[0, -1].argmax())
    assert path["content"].tolist()[-1] == repr(llama.string(best))
    with pytest.raises(hk.errors.BadPrompt, match="2 prompts"):
        hk.logit_path(llama, ["a", "b"])


@pytest.mark.parametrize(("asked", "count"), [({}, 3), ({"top": 5}, 5)])
def test_the_path_names_as_many_leading_tokens_as_are_asked_for(llama, asked, count):
    path = hk.logit_path(llama, "I like oat milk in my", pos=2, **asked).set_index("stage")[
        "content"
    ]
    run = hk.forward(llama, "I like oat milk in my")
    logits = run.logits[0, 2]
    top = logits.topk(count)
    names = [repr(llama.string(token)) for token in top.indices.tolist()]
    numbers = [
        f"{name} {value:.2f}" for name, value in zip(names, top.values.tolist(), strict=True)
    ]
    assert path["logits"] == ", ".join(numbers)
    shares = logits.softmax(-1)[top.indices].tolist()
    assert path["probabilities"] == ", ".join(
        f"{name} {p:.1%}" for name, p in zip(names, shares, strict=True)
    )
    assert path["next token"] == names[0]


def test_the_default_models_logit_is_its_sum(smol):
    run = hk.forward(
        smol,
        ["I like oat milk in my", "When Mary and John went to the store, John gave a drink to"],
    )
    for token, row in ((" coffee", 0), (" Mary", 1)):
        table = hk.direct_logits(run, token, heads=True)
        said = float(run.logits[row, run.lengths[row] - 1, smol.token(token)])
        part = table[(table["row"] == row) & (table["kind"] != "residual")]
        assert part["logit"].sum() == pytest.approx(said, abs=1e-4)
        assert (part["kind"] == "head").sum() == 270


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v4"])
def test_a_model_of_several_streams_has_no_sum_and_no_lens(family):
    lm = hk.tiny(family)
    with pytest.raises(hk.errors.MissingSite, match="several residual streams"):
        hk.direct_logits(hk.forward(lm, IDS[:1]), 7)
    with pytest.raises(hk.errors.MissingSite, match="several residual streams"):
        hk.logit_lens(lm, IDS[:1])


def test_a_model_in_float64_whose_norms_compute_in_float32_is_split():
    lm = hk.tiny("llama")
    lm.model.double()
    run = hk.forward(lm, [[5, 6, 7]])
    table = hk.direct_logits(run, 7)
    assert table["logit"].sum() == pytest.approx(float(run.logits[0, -1, 7]), abs=1e-9)
    assert table.attrs["residual"] < 1e-5
