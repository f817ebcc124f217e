"""Attribution graphs: a planted one, sums and edges by hand, pruning by brute force, and the JSON."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hookkit as hk
from hookkit.errors import BadFile, BadHook, BadPrompt, Unsupported
from hookkit.features.graph import Graph, path_influence
from hookkit.models.sites import Site

PROMPT = [[5, 6, 7, 8, 9]]


class ExactRMSNorm(nn.Module):
    """An RMSNorm that computes in the dtype of its input, which those of transformers do not."""

    def __init__(self, weight, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight.detach().clone()), epsilon

    def forward(self, states):
        scale = states.square().mean(-1, keepdim=True).add(self.epsilon).rsqrt()
        return states * scale * self.weight


def exact(family: str) -> hk.LM:
    """A tiny model whose every step is in float64, and whose attention is the eager one."""
    lm = hk.tiny(family)
    model = lm.model.double()
    model.set_attn_implementation("eager")
    if family == "mixtral":  # the grouped product of matrices knows no float64
        model.set_experts_implementation("eager")
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weight = module.weight + (type(module).__name__ == "Gemma2RMSNorm")
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExactRMSNorm(weight, epsilon))
    return lm


def transcoder(layer, d=32, n=40, activation="relu", reads="mlp_in", dtype=torch.float64, **fields):
    generator = torch.Generator().manual_seed(layer)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator, dtype=dtype)

    weights = {"W_enc": draw(d, n), "b_enc": draw(n), "W_dec": draw(n, d), "b_dec": draw(d)}
    if activation == "gated":
        weights |= {"b_gate": draw(n), "b_mag": draw(n), "r_mag": draw(n)}
    if activation == "jumprelu":
        weights["threshold"] = draw(n).abs()
    if fields.pop("skip", False):
        weights["W_skip"] = draw(d, d)
    sites = (Site("mlp_out", layer), Site(reads, layer))
    return hk.types.Dictionary(*sites, weights, activation, **fields)


def with_transcoders(lm: hk.LM, *transcoders) -> hk.LM:
    return lm.with_dictionaries(*transcoders, check=False)


KINDS = [
    [transcoder(layer) for layer in range(3)],
    [
        transcoder(0, activation="topk", k=8),
        transcoder(1, activation="jumprelu", skip=True),
        transcoder(2, activation="gated", reads="resid_mid"),
    ],
    [transcoder(layer, centred=True) for layer in range(3)],
]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return hk.attribution_graph(with_transcoders(exact("llama"), *KINDS[0]), PROMPT)


# ---- a planted graph


def planted() -> hk.LM:
    """GPT-2 with MLPs of three neurons: A reads token 5 in block 0, B token 6; attention of block 1
    takes the mean of what A wrote, and AB, in block 1, reads that and what B wrote. AB raises the
    logit of token 9 and lowers that of token 8. Nothing else has a weight.

    Every direction has one 1 and one -1, so that the norms subtract a mean of zero.
    """
    settings = {"activation_function": "relu", "tie_word_embeddings": False}
    lm = hk.tiny("gpt2", config=settings)
    model = lm.model.double()
    for name, weight in model.named_parameters():
        value = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        nn.init.constant_(weight, value)
    five, six, a, moved, b, ab = torch.eye(32, dtype=torch.float64).unflatten(0, (16, 2))[:6].mT @ (
        torch.tensor([1.0, -1.0], dtype=torch.float64)
    )
    body = model.transformer
    with torch.no_grad():
        body.wte.weight[5], body.wte.weight[6] = 2 * five, 3 * six
        first, second = body.h[0].mlp, body.h[1].mlp
        first.c_fc.weight[:, 0], first.c_proj.weight[0] = five, a
        first.c_fc.weight[:, 1], first.c_proj.weight[1] = six, 2 * b
        attention = body.h[1].attn
        attention.c_attn.weight[:, 64] = a  # the first number of the first head's values
        attention.c_proj.weight[0] = moved
        second.c_fc.weight[:, 0] = moved + b
        second.c_fc.bias[0], second.c_proj.weight[0] = 0.25, ab
        model.lm_head.weight[9], model.lm_head.weight[8] = ab, -ab
    return lm


def exact_transcoder(lm: hk.LM, layer: int):
    mlp = lm.model.transformer.h[layer].mlp
    weights = {"W_enc": mlp.c_fc.weight, "b_enc": mlp.c_fc.bias}
    weights |= {"W_dec": mlp.c_proj.weight, "b_dec": mlp.c_proj.bias}
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    return hk.types.Dictionary(Site("mlp_out", layer), Site("mlp_in", layer), copies, "relu")


def test_a_planted_graph_has_its_edges_and_no_others():
    lm = planted()
    lm = with_transcoders(lm, *[exact_transcoder(lm, layer) for layer in range(3)])
    graph = hk.attribution_graph(lm, [[5, 6]], max_logits=2)

    def norm(*coordinates):  # each counts twice, as 1 and -1
        return 1 / math.sqrt(2 * sum(value**2 for value in coordinates) / 32 + 1e-5)

    # the stream at position 0 has 2 five, at position 1 3 six
    A = 2 * 2 * norm(2)
    B = 2 * 3 * norm(3)
    # block 1: position 1 sees both positions with 1/2, and reads 2 A from position 0
    taken = 0.5 * 2 * A * norm(2, A)
    in_norm = norm(3, 2 * B, taken)
    AB = 2 * taken * in_norm + 2 * 2 * B * in_norm + 0.25
    logit = 2 * AB * norm(3, 2 * B, taken, AB)
    # position 0 has its own AB: it sees itself alone, and no B
    taken0 = 2 * A * norm(2, A)
    in_norm0 = norm(2, A, taken0)
    expected = {
        ("resid_pre.0@0", "feat.mlp_out.0.0@0"): A,
        ("resid_pre.0@1", "feat.mlp_out.0.1@1"): B,
        ("feat.mlp_out.0.0@0", "feat.mlp_out.1.0@0"): 2 * taken0 * in_norm0,
        ("feat.mlp_out.0.0@0", "feat.mlp_out.1.0@1"): 2 * taken * in_norm,
        ("feat.mlp_out.0.1@1", "feat.mlp_out.1.0@1"): 4 * B * in_norm,
        ("feat.mlp_out.1.0@1", "lm_head@1"): logit,
    }
    edges = graph.edges[graph.edges["weight"].abs() > 1e-12]
    source = edges["source_site"] + "@" + edges["source_pos"].astype(str)
    target = edges["target_site"] + "@" + edges["target_pos"].astype(str)
    weights = dict(zip(zip(source, target, strict=True), edges["weight"], strict=True))
    assert set(weights) == set(expected)
    for edge, weight in expected.items():
        assert weights[edge] == pytest.approx(weight, abs=1e-12), edge
    nodes = graph.nodes.set_index(graph.nodes["site"] + "@" + graph.nodes["pos"].astype(str))
    assert nodes.loc["feat.mlp_out.1.0@1", "value"] == pytest.approx(AB, abs=1e-12)
    assert nodes.loc["feat.mlp_out.1.0@1", "bias"] == pytest.approx(0.25, abs=1e-12)
    assert nodes.loc[nodes["kind"] == "error", "value"].max() < 1e-12
    assert graph.logits["token_id"].iloc[0] == 9
    kept = graph.prune(node_share=1.0, edge_share=1.0 - 1e-9).nodes
    # AB at position 0 reaches no logit
    assert set(kept.loc[kept["kind"] == "feature", "site"] + "@" + kept["pos"].astype(str)) >= {
        "feat.mlp_out.0.0@0",
        "feat.mlp_out.0.1@1",
        "feat.mlp_out.1.0@1",
    }
    assert not ((kept["site"] == "feat.mlp_out.1.0") & (kept["pos"] == 0)).any()


# ---- the law


@pytest.mark.parametrize("kinds", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "granite", "mixtral"])
def test_edges_and_bias_sum_to_what_the_transcoder_reads_and_to_the_logit(family, kinds):
    lm = exact(family)
    transcoders = KINDS[kinds]
    if "resid_mid" not in lm.layout.names:
        transcoders = [*transcoders[:2], transcoder(2, activation="gated")]
    lm = with_transcoders(lm, *transcoders)
    graph = hk.attribution_graph(lm, PROMPT)
    reads = [dictionary.reads for dictionary in lm.dictionaries]
    run = hk.forward(lm, PROMPT, hk.capture([*reads, "lm_head"]))
    sums = graph.adjacency.sum(1).numpy() + graph.nodes["bias"].to_numpy()
    assert (graph.nodes["kind"] == "feature").sum() > 60
    for number, node in graph.nodes[graph.nodes["kind"] == "feature"].iterrows():
        weights = transcoders[node["layer"]].weights
        x = run[reads[node["layer"]]][0, node["pos"]]
        x = x - weights["b_dec"] * transcoders[node["layer"]].centred
        before = x @ weights["W_enc"][:, node["feature"]]
        if "r_mag" in weights:
            expected = before * weights["r_mag"][node["feature"]].exp()
            expected = expected + weights["b_mag"][node["feature"]]
        else:
            expected = before + weights["b_enc"][node["feature"]]
        assert sums[number] == pytest.approx(float(expected), abs=1e-9), node["site"]
    raw = run["lm_head"][0, -1]
    for number, node in graph.nodes[graph.nodes["kind"] == "logit"].iterrows():
        expected = float(raw[node["token_id"]] - raw.mean())
        assert sums[number] == pytest.approx(expected, abs=1e-9)
    probs = run.logits[0, -1].softmax(-1).topk(len(graph.logits))
    assert graph.logits["token_id"].tolist() == probs.indices.tolist()
    assert graph.logits["prob"].tolist() == pytest.approx(probs.values.tolist())


def llama_by_hand(lm, sources, patterns, scales):
    """What each transcoder reads, and the centred logits, for these sources: Llama in plain torch
    with these patterns and scales of norms."""
    model, head_size = lm.model.model, 8
    stream, read = sources[0], []
    for layer, block in enumerate(model.layers):
        states = stream * scales[2 * layer] * block.input_layernorm.weight
        values = (states @ block.self_attn.v_proj.weight.T).unflatten(-1, (-1, head_size))
        heads = patterns[layer].shape[0]
        values = values.repeat_interleave(heads // values.shape[1], dim=1)
        mixed = torch.einsum("hqk,khd->qhd", patterns[layer], values).flatten(1)
        stream = stream + mixed @ block.self_attn.o_proj.weight.T
        read.append(stream * scales[2 * layer + 1] * block.post_attention_layernorm.weight)
        stream = stream + sources[1 + layer]
    logits = lm.model.lm_head(stream[-1] * scales[-1][-1] * model.norm.weight)
    return read, logits - logits.mean()


def run_by_hand(lm):
    """What each norm reads, what each MLP adds, and the patterns: from hooks of torch."""
    inputs, added, handles = [], [], []
    for name, module in lm.model.named_modules():
        if "norm" in name:
            keep = lambda module, args, out: inputs.append((args[0][0], module.epsilon))  # noqa: E731
            handles.append(module.register_forward_hook(keep))
        if name.endswith("mlp"):
            keep = lambda module, args, out: added.append(out[0])  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        result = lm.model(torch.tensor(PROMPT), output_attentions=True)
    for handle in handles:
        handle.remove()
    scales = [(x.square().mean(-1, keepdim=True) + epsilon).rsqrt() for x, epsilon in inputs]
    return added, [pattern[0] for pattern in result.attentions], scales


def target_values(graph, read, logits):
    """The value of every feature and logit of a graph, and 0 for other nodes, in their order."""
    values = []
    for node in graph.nodes.itertuples():
        value = 0.0
        if node.kind == "feature":
            weights = KINDS[0][node.layer].weights
            value = read[node.layer][node.pos] @ weights["W_enc"][:, node.feature]
            value = float(value + weights["b_enc"][node.feature])
        if node.kind == "logit":
            value = float(logits[node.token_id])
        values.append(value)
    return np.array(values)


@torch.no_grad()
def test_an_edge_is_what_the_source_changes_in_a_frozen_forward_by_hand(graph):
    lm = exact("llama")
    assert lm.sizes["kv_head"] < lm.sizes["head"]
    added, *frozen = run_by_hand(lm)
    sources = [lm.model.model.embed_tokens.weight[PROMPT[0]], *added]
    read, logits = llama_by_hand(lm, sources, *frozen)
    before = target_values(graph, read, logits)
    others = graph.nodes.index[graph.nodes["kind"].isin(["error", "token"])]
    for number in [0, 7, 40, 80, *others[::3]]:
        node = graph.nodes.loc[number]
        index, vector = 0, sources[0][node["pos"]]
        if node["kind"] != "token":
            index, dictionary = 1 + node["layer"], KINDS[0][node["layer"]]
            vector = (
                added[node["layer"]] - dictionary.decode(dictionary.encode(read[node["layer"]]))
            )[node["pos"]]
        if node["kind"] == "feature":
            vector = node["value"] * dictionary.weights["W_dec"][node["feature"]]
        changed = [source.clone() for source in sources]
        changed[index][node["pos"]] -= vector
        after = target_values(graph, *llama_by_hand(lm, changed, *frozen))
        edges = graph.adjacency[:, number].numpy()
        assert np.abs(before - after - edges).max() < 1e-9, node["site"]
    alone = [dictionary.weights["b_dec"].expand_as(sources[0]) for dictionary in KINDS[0]]
    alone = [torch.zeros_like(sources[0]), *alone]
    biases = target_values(graph, *llama_by_hand(lm, alone, *frozen))
    assert np.abs(graph.nodes["bias"].fillna(0).to_numpy() - biases).max() < 1e-9


def test_the_size_of_a_backward_changes_nothing(graph):
    lm = with_transcoders(exact("llama"), *KINDS[0])
    one = hk.attribution_graph(lm, PROMPT, batch_size=7)
    torch.testing.assert_close(one.adjacency, graph.adjacency, rtol=0, atol=1e-12)


def test_features_beyond_the_limit_raise_or_are_a_part_of_the_errors(graph):
    lm = with_transcoders(exact("llama"), *KINDS[0])
    count = int((graph.nodes["kind"] == "feature").sum())
    with pytest.raises(BadHook, match=f"{count} features are active .* max_features=50"):
        hk.attribution_graph(lm, PROMPT, max_features=50)
    small = hk.attribution_graph(lm, PROMPT, max_features=50, beyond="error")
    assert small.about["active_features"] == count
    features = small.nodes[small.nodes["kind"] == "feature"]
    assert len(features) == 50
    strength = []
    for node in graph.nodes[graph.nodes["kind"] == "feature"].itertuples():
        direction = KINDS[0][node.layer].weights["W_dec"][node.feature]
        strength.append((float(node.value * direction.norm()), node.site, node.pos))
    strongest = {entry[1:] for entry in sorted(strength, reverse=True)[:50]}
    assert set(zip(features["site"], features["pos"], strict=True)) == strongest
    # what two errors and the left-out features add to a logit is the same
    is_rest, was_rest = (g.nodes["kind"].eq("token").to_numpy() for g in (small, graph))
    first = (
        small.adjacency[-1, torch.tensor(is_rest)],
        graph.adjacency[-1, torch.tensor(was_rest)],
    )
    torch.testing.assert_close(*first, rtol=0, atol=1e-12)
    assert float(small.adjacency[-1].sum()) == pytest.approx(float(graph.adjacency[-1].sum()))


def test_the_model_is_left_as_it_was():
    lm = with_transcoders(exact("llama"), *KINDS[0])
    lm.model.requires_grad_(True)
    before = [dict(vars(module)) for module in lm.model.modules()]
    hk.attribution_graph(lm, PROMPT)
    gated = with_transcoders(hk.tiny("afmoe"), *[transcoder(layer) for layer in range(3)])
    gated.model.requires_grad_(True)
    states = [dict(vars(module)) for module in gated.model.modules()]
    with pytest.raises(Unsupported, match=r"edges into feat.mlp_out.\d.\d+ at position \d"):
        hk.attribution_graph(gated, PROMPT)
    for model, old in ((lm.model, before), (gated.model, states)):
        for module, attributes in zip(model.modules(), old, strict=True):
            assert vars(module).keys() == attributes.keys()
            assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(weight.requires_grad for weight in model.parameters())


# ---- pruning


def random_graph(seed: int) -> Graph:
    """Three layers of features and errors, two tokens and two logits, with random edges."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ["feature"] * 12 + ["error"] * 3 + ["token"] * 2 + ["logit"] * 2
    stage = [1 + number // 4 for number in range(12)] + [1, 2, 3] + [0, 0] + [5, 5]
    weights = torch.randn(19, 19, generator=generator, dtype=torch.float64)
    weights *= torch.rand(19, 19, generator=generator) < 0.6
    earlier = torch.tensor(stage)[:, None] > torch.tensor(stage)
    is_target = torch.tensor([kind in ("feature", "logit") for kind in kinds])
    nodes = pd.DataFrame({"kind": kinds, "site": "s", "pos": 0})
    nodes["prob"] = [float("nan")] * 17 + [0.6, 0.3]
    return Graph(nodes, weights * earlier * is_target[:, None], (), {"prompt": "", "model": ""})


def influence_by_inverse(adjacency, weights):
    shares = adjacency.abs() / adjacency.abs().sum(1, keepdim=True).clamp(min=1e-300)
    eye = torch.eye(len(shares), dtype=torch.float64)
    return weights @ (torch.linalg.inv(eye - shares) - eye), shares


def fewest(scores, share):
    """The smallest score of the fewest that have a share of the sum, one after the other."""
    total = 0.0
    for score in sorted(scores, reverse=True):
        total += score
        if total >= share * sum(scores) - 1e-12:
            return score
    raise AssertionError


@pytest.mark.parametrize("seed", range(6))
def test_pruning_is_that_of_the_paper_step_by_step(seed):
    graph = random_graph(seed)
    weights = torch.tensor([0.0] * 17 + [0.6, 0.3], dtype=torch.float64)
    influence, _ = influence_by_inverse(graph.adjacency, weights)
    torch.testing.assert_close(path_influence(graph.adjacency, weights), influence)
    kinds = graph.nodes["kind"].tolist()
    limit = fewest(influence.tolist(), 0.8)
    nodes = {
        n for n in range(19) if kinds[n] in ("token", "logit") or influence[n] >= limit - 1e-12
    }
    between = graph.adjacency.clone()
    for number in set(range(19)) - nodes:
        between[number], between[:, number] = 0, 0
    inner, shares = influence_by_inverse(between, weights)
    scores = shares * (inner + weights)[:, None]
    limit = fewest(scores.flatten().tolist(), 0.9)
    edges = {
        (t, s) for t in range(19) for s in range(19) if scores[t, s] >= max(limit - 1e-12, 1e-15)
    }
    changed = True
    while changed:
        changed = False
        for number in sorted(nodes):
            reaches = any(source == number for _, source in edges)
            is_reached = any(target == number for target, _ in edges)
            loose = (kinds[number] in ("feature", "error") and not reaches) or (
                kinds[number] == "feature" and not is_reached
            )
            if loose:
                nodes.discard(number)
                edges = {edge for edge in edges if number not in edge}
                changed = True
    pruned = graph.prune(node_share=0.8, edge_share=0.9)
    order = sorted(nodes)
    assert pruned.nodes["kind"].tolist() == [kinds[number] for number in order]
    expected = torch.zeros(len(order), len(order), dtype=torch.float64)
    for target, source in edges:
        weight = graph.adjacency[target, source]
        expected[order.index(target), order.index(source)] = weight
    assert torch.equal(pruned.adjacency, expected)
    assert len(order) < 19 and pruned.about["pruned"] == {"node_share": 0.8, "edge_share": 0.9}


def test_the_influence_of_nodes_is_in_the_table(graph):
    nodes = graph.nodes
    weights = torch.tensor(nodes["prob"].fillna(0).to_numpy())
    influence, _ = influence_by_inverse(graph.adjacency, weights)
    shares = (influence / influence.sum())[: -len(graph.logits)].tolist()
    assert nodes["influence"].dropna().tolist() == pytest.approx(shares, abs=1e-12)
    strongest = nodes.sort_values("influence", ascending=False)
    assert strongest["cumulative"].dropna().is_monotonic_increasing
    assert nodes["cumulative"].max() == pytest.approx(1)
    with pytest.raises(BadHook, match="node_share"):
        graph.prune(node_share=1.5)


# ---- JSON

# github.com/safety-research/circuit-tracer, circuit_tracer/frontend/graph_models.py (version 0.5.0)
METADATA = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}
Q_PARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
}
LINK = {"source": str, "target": str, "weight": float}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check(value, schema):
    for name, kind in schema.items():
        assert type(value[name]) is kind, (name, value)


def refuse(word):
    raise AssertionError(word)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_file_is_that_of_circuit_tracer_and_is_read_back(graph, pruned, tmp_path):
    saved = graph.prune() if pruned else graph
    path = saved.save(tmp_path / "graphs" / "five.json", scan="mine")
    content = json.loads(path.read_text(), parse_constant=refuse)
    check(content, {"metadata": dict, "qParams": dict, "nodes": list, "links": list})
    check(content["metadata"], METADATA)
    check(content["qParams"], Q_PARAMS)
    assert content["metadata"]["slug"] == "five" and content["metadata"]["scan"] == "mine"
    assert content["metadata"]["prompt_tokens"] == list(saved.tokens)
    assert content["metadata"]["node_threshold"] == (0.8 if pruned else None)
    for node in content["nodes"]:
        check(node, NODE)
        assert node["feature_type"] in TYPES and 0 <= node["ctx_idx"] < 5
        assert node["influence"] is None or 0 <= node["influence"] <= 1 + 1e-9
        if node["feature_type"] == "cross layer transcoder":
            layer, feature, pos = map(int, node["node_id"].split("_"))
            assert (str(layer), pos) == (node["layer"], node["ctx_idx"])
            total = layer + feature
            assert node["feature"] == total * (total + 1) // 2 + feature
            assert type(node["activation"]) is float
        if node["feature_type"] == "logit":
            assert node["layer"] == "4" and node["clerp"].endswith(f"(p={node['token_prob']:.3f})")
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids) == len(saved.nodes)
    for link in content["links"]:
        check(link, LINK)
        assert {link["source"], link["target"]} <= set(ids)
    assert len(content["links"]) == len(saved.edges)
    again = hk.load_graph(path)
    assert torch.equal(again.adjacency, saved.adjacency)
    pd.testing.assert_frame_equal(again.nodes, saved.nodes)
    assert (again.tokens, again.about) == (saved.tokens, dict(saved.about))


def test_the_folder_lists_its_graphs_once_each(graph, tmp_path):
    small = graph.prune()
    for name in ("one", "two", "one"):
        small.save(tmp_path / f"{name}.json")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [item["slug"] for item in listed] == ["two", "one"]
    for name in ("graph-metadata.json", "graph.txt"):
        with pytest.raises(BadHook, match="json"):
            small.save(tmp_path / name)
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(BadFile, match="graph-metadata.json"):
        small.save(tmp_path / "three.json")
    assert not (tmp_path / "three.json").exists()


def test_another_file_is_no_graph(graph, tmp_path):
    path = graph.prune().save(tmp_path / "one.json")
    with pytest.raises(BadFile, match="Graph.save"):
        hk.load_graph(tmp_path / "graph-metadata.json")
    content = json.loads(path.read_text())
    content["links"][0]["source"] = "nobody"
    path.write_text(json.dumps(content))
    with pytest.raises(BadFile, match="nobody"):
        hk.load_graph(path)


# ---- what is refused


def test_what_a_graph_cannot_be_made_of_is_refused():
    lm = hk.tiny("gpt2")
    single = [transcoder(layer, dtype=torch.float32) for layer in range(3)]
    with pytest.raises(BadHook, match=r"none at mlp_out.1:"):
        hk.attribution_graph(with_transcoders(lm, single[0], single[2]), PROMPT)
    autoencoder = transcoder(1, reads="mlp_out", dtype=torch.float32)
    with pytest.raises(BadHook, match=r"mlp_out.1 reads mlp_out.1"):
        hk.attribution_graph(with_transcoders(lm, single[0], autoencoder, single[2]), PROMPT)
    normalized = transcoder(1, normalization="layer_norm", dtype=torch.float32)
    with pytest.raises(Unsupported, match="normalizes"):
        hk.attribution_graph(with_transcoders(lm, single[0], normalized, single[2]), PROMPT)
    replacing = lm.with_dictionaries(*single, replace=True, check=False)
    with pytest.raises(BadHook, match="replace=True"):
        hk.attribution_graph(replacing, PROMPT)
    every = with_transcoders(lm, *single)
    with pytest.raises(BadPrompt, match="one prompt, and 2"):
        hk.attribution_graph(every, [[5, 6], [7, 8]])
    with pytest.raises(BadHook, match="max_logits"):
        hk.attribution_graph(every, PROMPT, max_logits=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "cohere", "falcon", "gpt_oss"])
def test_models_of_transformers_as_they_are(family):
    """In float32, with their own norms and the attention in use; `Unsupported` if sums miss."""
    lm = hk.tiny(family)
    single = [transcoder(layer, dtype=torch.float32) for layer in range(3)]
    graph = hk.attribution_graph(with_transcoders(lm, *single), PROMPT, max_logits=3)
    assert len(graph.logits) == 3 and "feature" in repr(graph)
    assert graph.adjacency.dtype == torch.float32
