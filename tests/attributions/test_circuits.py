"""Circuits: a run of some edges is what the sum of each receiver's own senders gives, computed by hand."""

import json

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_families import ALL, made

import hookkit as hk
from hookkit.attributions.edge_graph import graph_of_model
from hookkit.errors import (
    BadFile,
    BadHook,
    BadPrompt,
    EmptySelection,
    HookkitError,
    OtherModel,
    Unsupported,
)

CLEAN = [[5, 6, 7, 8, 9, 30], [9, 10, 3], [11, 12, 13]]
CORRUPTED = [[5, 6, 17, 8, 9, 30], [9, 11, 3], [11, 12, 14]]
DIFF = hk.metrics.logit_diff(5, 7)


def all_edges(lm) -> hk.Circuit:
    graph = graph_of_model(lm)
    senders, receivers = np.nonzero(graph.allowed)
    names = {
        "sender": np.array(graph.senders)[senders],
        "receiver": np.array(graph.receivers)[receivers],
    }
    scores = np.random.default_rng(1).normal(size=len(senders))
    return hk.Circuit(pd.DataFrame(names).assign(score=scores, in_circuit=True), "logit_diff")


def without(circuit, *edges):
    names = circuit.table["sender"] + ">" + circuit.table["receiver"]
    assert set(edges) <= set(names)
    return circuit.with_only(~names.isin(edges))


def some_of(circuit, seed=0, share=0.5):
    return circuit.with_only(np.random.default_rng(seed).random(len(circuit.table)) < share)


def scores_of(circuit) -> pd.DataFrame:
    table = circuit.table.rename(columns={"score": "logit_diff_delta"})
    return table.drop(columns="in_circuit").assign(n=1)


# ---- what a circuit computes


def gpt2_by_edges(model, ids, is_kept, ablated=None):
    """GPT-2 by hand, where every receiver adds up what it reads. Returns the logits and what each sender wrote."""
    transformer, n_heads = model.transformer, model.config.n_head
    written, order, fixed = {}, ["embed"], 0.0
    written["embed"] = transformer.wte.weight[ids] + transformer.wpe.weight[: len(ids)]

    def read(receiver):
        total = fixed
        for sender in order:
            total = total + (written if is_kept(sender, receiver) else ablated)[sender]
        return total

    for layer, block in enumerate(transformer.h):
        weight, bias, width = block.attn.c_attn.weight, block.attn.c_attn.bias, 32 // n_heads
        heads = []
        for head in range(n_heads):
            parts = []
            for number, name in enumerate("qkv"):
                columns = slice(32 * number + width * head, 32 * number + width * (head + 1))
                stream = block.ln_1(read(f"{name}.{layer}.{head}"))
                parts.append(stream @ weight[:, columns] + bias[columns])
            query, key, value = parts
            scores = query @ key.T / width**0.5
            mask = torch.ones_like(scores).triu(1).bool()
            z = scores.masked_fill(mask, -torch.inf).softmax(-1) @ value
            rows = slice(width * head, width * (head + 1))
            heads.append(z @ block.attn.c_proj.weight[rows])
        for head, value in enumerate(heads):
            written[f"z.{layer}.{head}"] = value
            order.append(f"z.{layer}.{head}")
        fixed = fixed + block.attn.c_proj.bias
        written[f"mlp_out.{layer}"] = block.mlp(block.ln_2(read(f"mlp_in.{layer}")))
        order.append(f"mlp_out.{layer}")
    return model.lm_head(transformer.ln_f(read("logits"))), written


@pytest.fixture(scope="module")
def gpt2_double():
    """A GPT-2 in float64, whose biases are not zero."""
    lm = hk.LM(hk.tiny("gpt2").model.double())
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
    return lm


@pytest.mark.parametrize("ablate", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.95])
@torch.no_grad()
def test_a_circuit_is_the_model_in_which_each_receiver_adds_up_its_own_senders(
    gpt2_double, share, ablate
):
    lm = gpt2_double
    circuit = some_of(all_edges(lm), int(100 * share), share)
    kept = set(zip(circuit.chosen["sender"], circuit.chosen["receiver"], strict=True))
    run = hk.run_circuit(lm, CLEAN, CORRUPTED, circuit, ablate=ablate)
    everything = [gpt2_by_edges(lm.model, ids, lambda *_: True)[1] for ids in CORRUPTED]
    for row, ids in enumerate(CLEAN):
        ablated = everything[row]
        if ablate == "mean":
            ablated = {}
            for name in everything[0]:
                ablated[name] = torch.cat([values[name] for values in everything]).mean(0)
        if ablate == "zero":
            ablated = {name: torch.zeros(32).double() for name in everything[0]}
        ablated = {name: values.expand(len(ids), 32) for name, values in ablated.items()}
        logits, _ = gpt2_by_edges(lm.model, ids, lambda *edge: edge in kept, ablated)
        assert torch.allclose(run.logits[row, : len(ids)], logits, rtol=1e-10, atol=1e-10)


def outputs_of(lm, ids, *paths):
    """The inputs and outputs of modules in a plain forward."""
    seen = {}
    handles = []
    for path in paths:

        def keep(module, args, kwargs, output, path=path):
            first = args[0] if args else kwargs["hidden_states"]
            seen[path] = first, output[0] if isinstance(output, tuple) else output

        module = lm.model.get_submodule(path)
        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        lm.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def logits_with(lm, ids, path, change, *, before=False):
    """The logits of a plain forward in which a module's output, or input, is changed."""
    module = lm.model.get_submodule(path)
    if before:
        handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, output: change(output))
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def difference_of_head(lm, layer, head, ids, other):
    """What a head of a Llama writes: on these ids minus on the others."""
    path = f"model.layers.{layer}.self_attn.o_proj"
    z, z_other = (outputs_of(lm, each, path)[path][0] for each in (ids, other))
    columns = slice(8 * head, 8 * head + 8)
    weight = lm.model.get_submodule(path).weight
    return (z - z_other)[..., columns] @ weight[:, columns].T


@torch.no_grad()
def test_one_missing_edge_of_a_llama_is_its_patch_by_hand(llama):
    """Plain hooks of torch; two query heads of this model share a key and a value."""
    ids, other = CLEAN[0], CORRUPTED[0]
    everything = all_edges(llama)

    def logits_without(edge):
        return hk.run_circuit(llama, [ids], [other], without(everything, edge)).logits[0]

    block = llama.model.model.layers[2]
    stream = outputs_of(llama, ids, "model.layers.2")["model.layers.2"][0]
    written = difference_of_head(llama, 0, 3, ids, other)
    changed = block.input_layernorm(stream - written)
    for edge, name, head in (
        ("q.2.1", "q_proj", 1),
        ("k.2.1", "k_proj", 1),
        ("v.2.0", "v_proj", 0),
    ):
        path, columns = f"model.layers.2.self_attn.{name}", slice(8 * head, 8 * head + 8)
        new = block.self_attn.get_submodule(name)(changed)

        def put(output, new=new, columns=columns):
            output = output.clone()
            output[..., columns] = new[..., columns]
            return output

        expected = logits_with(llama, ids, path, put)
        assert torch.allclose(logits_without(f"z.0.3>{edge}"), expected, atol=1e-5)
    mlp = outputs_of(llama, ids, "model.layers.1.mlp")["model.layers.1.mlp"][1]
    mlp_other = outputs_of(llama, other, "model.layers.1.mlp")["model.layers.1.mlp"][1]
    path = "model.layers.2.post_attention_layernorm"
    middle = outputs_of(llama, ids, path)[path][0]
    new_input = block.post_attention_layernorm(middle - (mlp - mlp_other))
    expected = logits_with(llama, ids, "model.layers.2.mlp", lambda _: new_input, before=True)
    assert torch.allclose(logits_without("mlp_out.1>mlp_in.2"), expected, atol=1e-5)
    expected = logits_with(llama, ids, "model.norm", lambda x: x - written, before=True)
    assert torch.allclose(logits_without("z.0.3>logits"), expected, atol=1e-5)
    plain = llama.model(torch.tensor([ids]), use_cache=False).logits[0]
    assert (plain - expected).abs().max() > 1e-2


@torch.no_grad()
def test_a_missing_head_goes_through_the_norm_after_attention():
    lm = hk.tiny("gemma2")
    ids, other = CLEAN[0], CORRUPTED[0]
    path = "model.layers.1.self_attn.o_proj"
    z, z_other = (outputs_of(lm, each, path)[path][0] for each in (ids, other))
    patched = z.clone()
    patched[..., :16] = z_other[..., :16]  # heads 0 and 1
    block = lm.model.model.layers[1]
    own, new = (
        block.post_attention_layernorm(block.self_attn.o_proj(each)) for each in (z, patched)
    )
    expected = logits_with(lm, ids, "model.norm", lambda x: x - own + new, before=True)
    missing = without(all_edges(lm), "z.1.0>logits", "z.1.1>logits")
    assert torch.allclose(
        hk.run_circuit(lm, [ids], [other], missing).logits[0], expected, atol=1e-5
    )


def has_edges(name) -> str:
    try:
        lm = made(name)
        check_ends(lm)
    except Unsupported as error:
        return str(error)
    except hk.errors.MissingSite as error:
        return str(error)
    return ""


def check_ends(lm):
    """All edges are the clean run, none the corrupted one, bit for bit; edges without a difference change nothing."""
    everything = all_edges(lm)
    clean, corrupted = hk.forward(lm, CLEAN).logits, hk.forward(lm, CORRUPTED).logits
    assert torch.equal(hk.run_circuit(lm, CLEAN, CORRUPTED, everything).logits, clean)
    none = everything.complement()
    assert torch.equal(hk.run_circuit(lm, CLEAN, CORRUPTED, none).logits, corrupted)
    only_first = [CORRUPTED[0], *CLEAN[1:]]
    logits = hk.run_circuit(lm, CLEAN, only_first, some_of(everything)).logits
    assert (logits[1:] - clean[1:]).abs().max() <= 1e-5 * clean.abs().max()
    assert (logits[0] - clean[0]).abs().max() > 1e-3


FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "falcon new", "granite", "olmo2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_clean_run_and_none_are_the_corrupted_run(name):
    check_ends(made(name))


REFUSED = (
    "no 'k'",
    "no 'z'",
    "no 'mlp_out'",
    "is not the sum of its embedding",
    "something else than queries",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_family_has_these_ends_or_says_why_not(name):
    reason = has_edges(name)
    assert not reason or any(words in reason for words in REFUSED)


def test_a_model_with_another_reader_of_the_stream_is_refused():
    lm = hk.tiny("afmoe")  # whose attention has a gate, which reads the stream too
    with pytest.raises(Unsupported, match="something else than queries, keys, values"):
        hk.run_circuit(lm, CLEAN, CORRUPTED, all_edges(lm))


def test_each_row_has_its_own_circuit_and_gives_what_it_gives_alone(llama):
    circuits = [some_of(all_edges(llama), seed) for seed in range(3)]
    together = hk.run_circuit(llama, CLEAN, CORRUPTED, circuits)
    for row, circuit in enumerate(circuits):
        alone = hk.run_circuit(llama, [CLEAN[row]], [CORRUPTED[row]], circuit, logits="last")
        last = len(CLEAN[row]) - 1
        assert torch.allclose(together.logits[row, last], alone.logits[0, -1], atol=1e-5)


def test_a_circuit_of_nodes_is_the_ablation_of_the_others(llama):
    nodes = [f"z.{layer}.{head}" for layer in range(3) for head in range(4)]
    nodes += [f"mlp_out.{layer}" for layer in range(3)]
    kept = np.isin(nodes, ["z.0.1", "z.2.3", "mlp_out.1"])
    circuit = hk.Circuit(pd.DataFrame({"node": nodes, "score": 1.0, "in_circuit": kept}))
    ids, other = CLEAN[0], CORRUPTED[0]
    handles = []
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp"
        values = outputs_of(llama, other, attention, mlp)
        heads = [f"z.{layer}.{head}" in ("z.0.1", "z.2.3") for head in range(4)]
        own = torch.tensor(np.repeat(heads, 8))

        def put(module, args, z=values[attention][0], own=own):
            return (torch.where(own, args[0], z),)

        handles.append(llama.model.get_submodule(attention).register_forward_pre_hook(put))
        if layer != 1:
            module = llama.model.get_submodule(mlp)
            handles.append(module.register_forward_hook(lambda m, a, o, v=values[mlp][1]: v))
    with torch.no_grad():
        expected = llama.model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    logits = hk.run_circuit(llama, [ids], [other], circuit).logits[0]
    assert torch.allclose(logits, expected, atol=1e-6)


def test_captures_see_what_a_circuit_computes_and_edits_are_refused(llama):
    circuit = some_of(all_edges(llama))
    run = hk.run_circuit(llama, CLEAN, CORRUPTED, circuit, hk.capture("pattern.2"))
    plain = hk.forward(llama, CLEAN, hk.capture("pattern.2"))
    assert not torch.allclose(run["pattern.2"], plain["pattern.2"])
    with pytest.raises(Unsupported, match="give captures"):
        hk.run_circuit(llama, CLEAN, CORRUPTED, circuit, hk.scale("z.1", 2.0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda lm, c: hk.run_circuit(lm, CLEAN, CLEAN, c), BadPrompt, "nothing is ablated"),
        (lambda lm, c: hk.run_circuit(lm, CLEAN, CORRUPTED, [c]), BadPrompt, "1 circuits for 3"),
        (lambda lm, c: hk.run_circuit(lm, CLEAN, CORRUPTED[:2], c), BadPrompt, "pairs positions"),
        (
            lambda lm, c: hk.run_circuit(lm, CLEAN, CORRUPTED, all_edges(hk.tiny("gpt2"))),
            OtherModel,
            "another model",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(llama, call, error, words):
    with pytest.raises(error, match=words):
        call(llama, all_edges(llama))


# ---- planted circuits


@pytest.fixture(scope="module")
def planted():
    """A Llama in which head 1 of block 0 and the MLP of block 1 alone write anything."""
    lm = hk.tiny("llama")
    with torch.no_grad():
        for layer, block in enumerate(lm.model.model.layers):
            kept = torch.zeros(32)
            if layer == 0:
                kept[8:16] = 1
            block.self_attn.o_proj.weight.mul_(kept)
            if layer != 1:
                block.mlp.down_proj.weight.zero_()
    return lm


def planted_edges(lm):
    nodes = ("embed", "z.0.1", "mlp_out.1")
    receivers = ("q.0.1", "k.0.0", "v.0.0", "mlp_in.1", "logits")
    everything = all_edges(lm)
    table = everything.table
    return everything.with_only(table["sender"].isin(nodes) & table["receiver"].isin(receivers))


def test_a_planted_circuit_is_the_whole_model_and_its_complement_is_nothing(planted):
    circuit = planted_edges(planted)
    assert len(circuit) == 8
    run = hk.run_circuit(planted, CLEAN, CORRUPTED, circuit)
    assert torch.equal(run.logits, hk.forward(planted, CLEAN).logits)
    result = hk.faithfulness(planted, CLEAN, CORRUPTED, circuit, DIFF, draws=2)
    by_name = result.table.set_index("circuit")["faithfulness"]
    assert by_name["circuit"] == 1.0 and by_name["model"] == 1.0 and by_name["none"] == 0.0
    assert by_name["complement"] == pytest.approx(0, abs=1e-5)
    assert (by_name["random"] - 1).abs().min() > 0.01


def test_every_planted_edge_is_needed_and_no_other(planted):
    circuit = planted_edges(planted)
    extra = circuit.with_only(
        circuit.table["in_circuit"] | (circuit.table["sender"] == "mlp_out.2")
    )
    table = hk.minimality(planted, CLEAN, CORRUPTED, extra, DIFF)
    planted_names = set(zip(circuit.chosen["sender"], circuit.chosen["receiver"], strict=True))
    for edge in table.itertuples():
        is_planted = (edge.sender, edge.receiver) in planted_names
        assert (abs(edge.change) > 1e-4) == is_planted
        left = without(extra, f"{edge.sender}>{edge.receiver}")
        expected = DIFF(hk.run_circuit(planted, CLEAN, CORRUPTED, left)).mean()
        assert edge.logit_diff == pytest.approx(float(expected), abs=1e-5)


# ---- choosing


def test_the_best_edges_are_taken_and_those_on_no_path_are_left_out(llama):
    everything = all_edges(llama)
    scores = scores_of(everything)
    for signed, merit in ((None, np.abs), ("negative", np.negative), ("positive", np.positive)):
        circuit = hk.circuit(scores, n=60, signed=signed)
        best = merit(scores["logit_diff_delta"]).nlargest(60).index
        names = everything.table["sender"] + ">" + everything.table["receiver"]
        chosen = set(circuit.chosen["sender"] + ">" + circuit.chosen["receiver"])
        assert chosen == on_paths(set(names[best]))
        assert len(chosen) < 60


def node_of(receiver):
    """The nodes that a receiver of the tiny Llama is a part of: two heads share a key."""
    name, layer, *head = receiver.split(".")
    if name == "mlp_in":
        return {f"mlp_out.{layer}"}
    if name == "q":
        return {f"z.{layer}.{head[0]}"}
    return {f"z.{layer}.{2 * int(head[0])}", f"z.{layer}.{2 * int(head[0]) + 1}"}


def on_paths(edges):
    """The edges on a path from the embedding to the logits, by following all paths."""
    pairs = [tuple(edge.split(">")) for edge in edges]
    forward, backward = {"embed"}, set()
    for _ in range(20):
        for sender, receiver in pairs:
            if sender in forward and receiver != "logits":
                forward |= node_of(receiver)
            if receiver == "logits" or node_of(receiver) & backward:
                backward.add(sender)
    kept = set()
    for sender, receiver in pairs:
        ends = {"logits"} if receiver == "logits" else node_of(receiver) & backward
        if sender in forward and ends:
            kept.add(f"{sender}>{receiver}")
    return kept


def test_greedy_circuits_grow_from_the_logits(llama):
    scores = scores_of(all_edges(llama))
    plain, greedy = hk.circuit(scores, n=25), hk.circuit(scores, n=25, greedy=True)
    assert len(plain) <= len(greedy) <= 25
    order = scores["logit_diff_delta"].abs()
    reached, chosen = {"logits"}, []
    for _ in range(25):  # by hand: the best edge into what is reached
        free = scores[scores["receiver"].isin(reached) & ~scores.index.isin(chosen)]
        best = order[free.index].idxmax()
        chosen.append(best)
        sender = scores["sender"][best]
        for receiver in set(scores["receiver"]) - {"logits"}:
            if sender in node_of(receiver):
                reached.add(receiver)
    names = scores["sender"] + ">" + scores["receiver"]
    kept = set(greedy.chosen["sender"] + ">" + greedy.chosen["receiver"])
    assert kept == on_paths(set(names[chosen]))


@pytest.mark.parametrize("n", [3, 20, 90, 160])
def test_random_circuits_have_as_many_edges_all_on_paths(llama, n):
    everything = all_edges(llama)
    circuit = everything.with_only(np.arange(len(everything.table)) < n)
    draws = [circuit.random(seed=seed) for seed in range(3)]
    for draw in draws:
        names = set(draw.chosen["sender"] + ">" + draw.chosen["receiver"])
        assert len(draw) == n and names == on_paths(names)
    assert not draws[0].table.equals(draws[1].table)
    assert draws[0].table.equals(circuit.random(seed=0).table)


def test_nodes_are_scored_by_the_tables_of_attribution(llama):
    parts = []
    for site in ("z", "mlp_out"):
        settings = {"direction": "noise"} if site == "z" else {"direction": "noise", "pos": [-1, 1]}
        table = hk.attribution(llama, CLEAN, CORRUPTED, site, DIFF, **settings)
        parts.append(table.assign(site=site))
    scores = pd.concat(parts)
    circuit = hk.circuit(scores, n=4)
    assert circuit.kind == "nodes" and len(circuit) == 4 and len(circuit.table) == 15
    values = dict(zip(circuit.table["node"], circuit.table["score"], strict=True))
    heads = parts[0]
    head = heads[(heads["layer"] == 1) & (heads["head"] == 2)]["logit_diff_delta"]
    assert values["z.1.2"] == pytest.approx(head.sum() / 3)
    mlp = parts[1][parts[1]["layer"] == 0]["logit_diff_delta"]
    assert values["mlp_out.0"] == pytest.approx(mlp.sum() / 3)
    result = hk.faithfulness(llama, CLEAN, CORRUPTED, scores, DIFF, sizes=[0.2, 1.0], draws=1)
    assert result.table["n_edges"].tolist()[:4] == [3, 15, 3, 15]


def test_scores_that_are_none_and_circuits_of_no_edge_are_refused(llama):
    scores = scores_of(all_edges(llama))
    for call, error, words in (
        (lambda: hk.circuit(scores, n=3, share=0.1), BadHook, "both say how many"),
        (lambda: hk.circuit(scores, share=0.0001), EmptySelection, "none of the best 0"),
        (lambda: hk.circuit(scores, n=10_000), HookkitError, "n=10000"),
        (lambda: hk.circuit(scores.drop(columns="sender")), BadHook, "hk.edge_attribution"),
        (lambda: hk.circuit(scores.assign(logit_diff_delta=np.nan)), BadHook, "not finite"),
        (lambda: hk.circuit(scores, share=1.5), HookkitError, "share"),
    ):
        with pytest.raises(error, match=words):
            call()


# ---- MIB's JSON


def test_a_circuit_is_written_in_the_names_of_mib_and_read_back(tmp_path):
    lm = hk.tiny("gpt2")
    circuit = some_of(all_edges(lm))
    document = json.loads(circuit.save(tmp_path / "a.json", lm).read_text())
    assert document["cfg"].items() >= {
        "n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32
    }.items()  # fmt: skip
    # the edges of the benchmark's own graph, by its own loops
    expected, stream = [], ["input"]
    for layer in range(3):
        heads = [f"a{layer}.h{head}" for head in range(4)]
        for node in stream:
            expected += [f"{node}->{head}<{letter}>" for head in heads for letter in "qkv"]
        stream += heads
        expected += [f"{node}->m{layer}" for node in stream]
        stream.append(f"m{layer}")
    expected += [f"{node}->logits" for node in stream]
    assert set(document["edges"]) == set(expected)
    assert set(document["nodes"]) == {*stream, "logits"}
    row = circuit.table[
        (circuit.table["sender"] == "z.0.2") & (circuit.table["receiver"] == "v.1.3")
    ].iloc[0]
    edge = document["edges"]["a0.h2->a1.h3<v>"]
    assert edge == {"score": row["score"], "in_graph": bool(row["in_circuit"])}
    loaded = hk.Circuit.load(tmp_path / "a.json")
    assert loaded.metric == "logit_diff"
    order = ["sender", "receiver"]
    left, right = (each.table.sort_values(order, ignore_index=True) for each in (circuit, loaded))
    pd.testing.assert_frame_equal(left, right)


def test_heads_that_share_a_key_have_equal_parts_of_its_score(llama, tmp_path):
    circuit = some_of(all_edges(llama))
    path = circuit.save(tmp_path / "a.json", llama)
    document = json.loads(path.read_text())
    row = circuit.table[
        (circuit.table["sender"] == "embed") & (circuit.table["receiver"] == "k.2.1")
    ].iloc[0]
    for head in (2, 3):
        edge = document["edges"][f"input->a2.h{head}<k>"]
        assert edge == {"score": row["score"] / 2, "in_graph": bool(row["in_circuit"])}
    runs = [
        hk.run_circuit(llama, CLEAN, CORRUPTED, each).logits
        for each in (circuit, hk.Circuit.load(path))
    ]
    assert torch.equal(*runs)
    del document["cfg"]["n_kv_heads"]  # as MIB's own tools write it
    path.write_text(json.dumps(document))
    with pytest.raises(OtherModel, match="kv_heads="):
        hk.run_circuit(llama, CLEAN, CORRUPTED, hk.Circuit.load(path))
    assert len(hk.Circuit.load(path, kv_heads=2)) == len(circuit)
    document["edges"]["input->a2.h2<k>"]["in_graph"] ^= True
    path.write_text(json.dumps(document))
    with pytest.raises(BadFile, match="it is one key"):
        hk.Circuit.load(path, kv_heads=2)


def test_circuits_of_nodes_are_files_too(llama, tmp_path):
    nodes = ["z.0.1", "z.2.3", "mlp_out.1"]
    table = pd.DataFrame(
        {"node": nodes, "score": [1.0, -2.0, 3.0], "in_circuit": [True, True, False]}
    )
    path = hk.Circuit(table, "prob").save(tmp_path / "nodes.json", llama)
    document = json.loads(path.read_text())
    assert document["nodes"]["a2.h3"] == {"in_graph": True, "score": -2.0}
    assert document["nodes"]["m1"] == {"in_graph": False, "score": 3.0}
    assert document["edges"]["input->m1"]["in_graph"] is False
    loaded = hk.Circuit.load(path)
    assert loaded.table.sort_values("node", ignore_index=True).equals(
        table.sort_values("node", ignore_index=True)
    )
    for text in ("{}", '{"cfg": {}, "nodes": {}, "edges": {"a": 1}}', "[]"):
        path.write_text(text)
        with pytest.raises(BadFile):
            hk.Circuit.load(path)


# ---- faithfulness


PAIRS = 12


@pytest.fixture(scope="module")
def many():
    draws = np.random.default_rng(0)
    clean = draws.integers(3, 200, (PAIRS, 6)).tolist()
    corrupted = [[*row[:2], 5 + row[2] % 90, *row[3:]] for row in clean]
    return clean, corrupted


def test_faithfulness_is_a_ratio_of_means_and_areas_are_trapezoids(llama, many):
    clean, corrupted = many
    scores = hk.edge_attribution(llama, clean, corrupted, DIFF)
    assert scores.attrs["direction"] == "noise"
    sizes = [0.05, 0.1, 0.3, 0.6, 1.0]
    result = hk.faithfulness(llama, clean, corrupted, scores, DIFF, sizes=sizes, draws=2)
    table = result.table
    assert table.groupby("circuit", sort=False).size().to_dict() == {
        "circuit": 5, "random": 10, "complement": 5, "model": 1, "none": 1
    }  # fmt: skip
    model = DIFF(hk.forward(llama, clean)).numpy()
    none = DIFF(hk.forward(llama, corrupted)).numpy()
    curve = []
    for size in sizes:
        try:
            circuit = hk.circuit(scores, share=size)
            own = DIFF(hk.run_circuit(llama, clean, corrupted, circuit)).numpy()
        except EmptySelection:
            own = none
        curve.append((own - none).mean() / (model - none).mean())
    own = table[table["circuit"] == "circuit"]
    assert own["faithfulness"].tolist() == pytest.approx(curve, abs=1e-4)
    assert own["size"].tolist() == sizes and curve[-1] == 1
    cpr = cmd = 0.0
    for number in range(len(sizes) - 1):  # as MIB adds them up
        width = sizes[number + 1] - sizes[number]
        cpr += width * (curve[number] + curve[number + 1]) / 2
        cmd += width * (abs(1 - curve[number]) + abs(1 - curve[number + 1])) / 2
    area = result.areas.set_index(["circuit", "draw"]).loc[("circuit", 0)]
    assert (area["cpr"], area["cmd"]) == pytest.approx((cpr, cmd), abs=1e-4)
    assert result.areas["circuit"].tolist() == ["circuit", "random", "random", "complement"]


def test_ten_sizes_take_twelve_forwards_of_the_prompts(llama, many, monkeypatch):
    clean, corrupted = many
    scores = hk.edge_attribution(llama, clean, corrupted, DIFF)
    rows = []
    plain = llama.model.forward
    monkeypatch.setattr(
        llama.model,
        "forward",
        lambda *args, **kwargs: rows.append(len(kwargs["input_ids"])) or plain(*args, **kwargs),
    )
    result = hk.faithfulness(llama, clean, corrupted, scores, DIFF, draws=0)
    distinct = len(
        {row.n_edges for row in result.table.itertuples() if row.circuit != "complement"}
    )
    complements = len({row.n_edges for row in result.table.itertuples()}) - distinct
    assert sum(rows) == result.n_rows <= (12 + complements) * PAIRS + 3
    assert len(rows) == result.n_forwards
    monkeypatch.setattr("hookkit.attributions.faithfulness.NUMBERS_AT_ONCE", 5 * 16 * 6 * 32)
    split = hk.faithfulness(llama, clean, corrupted, scores, DIFF, draws=0)
    assert split.n_forwards > result.n_forwards
    pd.testing.assert_frame_equal(split.table, result.table, atol=1e-4, rtol=1e-4)


def test_a_metric_that_compares_with_the_model_and_other_ablations_are_measured(llama, many):
    clean, corrupted = many
    circuit = some_of(all_edges(llama))
    for ablate in ("mean", "zero"):
        result = hk.faithfulness(
            llama, clean, corrupted, circuit, hk.metrics.kl(), ablate=ablate, draws=0
        )
        table = result.table.set_index("circuit")
        assert table.loc["model", "kl"] == 0 and table.loc["none", "kl"] > 0.01
        logits = hk.run_circuit(llama, clean, corrupted, circuit, ablate=ablate).logits[:, -1]
        plain = hk.forward(llama, clean).logits[:, -1].log_softmax(-1)
        divergence = (plain.exp() * (plain - logits.log_softmax(-1))).sum(-1).mean()
        assert table.loc["circuit", "kl"] == pytest.approx(float(divergence), abs=1e-4)


def test_two_circuits_are_compared_by_their_edges_and_by_their_faithfulness(llama, many):
    clean, corrupted = many
    everything = all_edges(llama)
    one, two = some_of(everything, 1, 0.4), some_of(everything, 2, 0.6)
    table = hk.compare_circuits(llama, clean, corrupted, one, two, DIFF)
    a, b = (set(zip(c.chosen["sender"], c.chosen["receiver"], strict=True)) for c in (one, two))
    assert table["n_edges"].tolist() == [len(a), len(b), len(a & b), len(a | b)]
    assert table["jaccard"][0] == pytest.approx(len(a & b) / len(a | b))
    shares = []
    for circuit, edges in ((one, a), (two, b)):
        scores = circuit.chosen.set_index(["sender", "receiver"])["score"].abs()
        shares.append({edge: scores[edge] / scores.sum() for edge in edges})
    least = sum(min(shares[0].get(edge, 0), shares[1].get(edge, 0)) for edge in a | b)
    most = sum(max(shares[0].get(edge, 0), shares[1].get(edge, 0)) for edge in a | b)
    assert table["weighted_jaccard"][0] == pytest.approx(least / most)
    alone = hk.faithfulness(llama, clean, corrupted, two, DIFF, draws=0).table
    assert table["faithfulness"][1] == pytest.approx(alone["faithfulness"][0], abs=1e-5)
    same = hk.compare_circuits(llama, clean, corrupted, one, one, DIFF)
    assert same["jaccard"][0] == 1 and same["weighted_jaccard"][0] == pytest.approx(1)
    with pytest.raises(BadHook, match="other edges"):
        hk.compare_circuits(llama, clean, corrupted, one, all_edges(hk.tiny("gpt2")), DIFF)


def test_a_metric_that_the_prompts_do_not_change_has_no_faithfulness(llama):
    constant = lambda logits: logits[:, 0] * 0 + 1  # noqa: E731
    with pytest.raises(EmptySelection, match="there is nothing that a circuit could explain"):
        hk.faithfulness(llama, CLEAN, CORRUPTED, some_of(all_edges(llama)), constant, draws=0)


def test_scores_of_some_edges_have_no_paths_and_no_controls(llama):
    everything = all_edges(llama)
    for name in ("gpt2", "gpt_neox", "mimo_v2_flash"):
        assert len(hk.circuit(scores_of(all_edges(hk.tiny(name))), share=1.0).table)
    for part in (everything.table["sender"] != "mlp_out.0", everything.table.index != 7):
        some = hk.Circuit(everything.table[part])
        with pytest.raises(BadHook, match="not all of a model"):
            hk.circuit(scores_of(some), n=80)
        logits = hk.run_circuit(llama, CLEAN, CORRUPTED, some).logits
        left_out = everything.with_only(part)
        assert torch.equal(logits, hk.run_circuit(llama, CLEAN, CORRUPTED, left_out).logits)
        with pytest.raises(BadHook, match="controls need all of them"):
            hk.faithfulness(llama, CLEAN, CORRUPTED, some, DIFF, draws=0)


def test_a_circuit_is_a_graph_of_networkx_whose_paths_lead_from_the_embedding_to_the_logits(llama):
    circuit = some_of(all_edges(llama), share=0.3)
    graph = circuit.to_networkx()
    n_shared = llama.sizes["head"] // llama.sizes["kv_head"]
    counts = circuit.chosen["receiver"].str[0].value_counts()
    expected = counts.sum() + (n_shared - 1) * (counts["k"] + counts["v"])
    assert graph.number_of_edges() == expected and n_shared == 2
    row = circuit.chosen[circuit.chosen["receiver"].str.startswith("k.1.1")].iloc[0]
    for head in (2, 3):  # which share this key
        assert graph.edges[row["sender"], f"z.1.{head}", "k"]["score"] == row["score"]
    assert networkx.is_directed_acyclic_graph(graph)
    assert networkx.has_path(graph, "embed", "logits")
    nodes = hk.Circuit(pd.DataFrame({"node": ["z.0.1"], "score": [2.0], "in_circuit": [True]}))
    assert list(nodes.to_networkx().nodes(data="score")) == [("z.0.1", 2.0)]


def test_cmd_has_the_interval_of_a_bootstrap_over_prompts_or_none_for_few(llama):
    generator = np.random.default_rng(0)
    clean = generator.integers(20, 300, (60, 5)).tolist()
    corrupted = [[*row[:2], (row[2] + 3) % 300, *row[3:]] for row in clean]
    gaps = []  # the prompts on which the metric moves most, in one direction
    for prompts in (clean, corrupted):
        logits = hk.forward(llama, prompts).logits[:, -1]
        gaps.append(logits[:, 5] - logits[:, 7])
    best = (gaps[0] - gaps[1]).topk(12).indices.tolist()
    clean, corrupted = [clean[row] for row in best], [corrupted[row] for row in best]
    scores = hk.edge_attribution(llama, clean, corrupted, DIFF)
    sizes = [0.1, 0.4, 1.0]
    result = hk.faithfulness(llama, clean, corrupted, scores, DIFF, sizes=sizes, draws=0)
    own = result.areas.set_index("circuit").loc["circuit"]
    alone = []
    for first, second in zip(clean, corrupted, strict=True):
        arms = [hk.circuit(scores, share=size) for size in sizes]
        runs = [hk.run_circuit(llama, [first], [second], arm) for arm in arms]
        runs += [hk.forward(llama, [first]), hk.forward(llama, [second])]
        alone.append([float(run.logits[0, -1, 5] - run.logits[0, -1, 7]) for run in runs])
    values = np.array(alone).T
    kept, whole = values[:3] - values[4], values[3] - values[4]
    areas = []
    for _ in range(2000):
        rows = generator.integers(0, 12, 12)
        curve = np.abs(1 - kept[:, rows].sum(1) / whole[rows].sum())
        areas.append(np.trapezoid(curve, sizes))
    low, high = np.quantile(areas, [0.025, 0.975])
    assert own["cmd_low"] == pytest.approx(low, rel=0.15)
    assert own["cmd_high"] == pytest.approx(high, rel=0.15)
    assert own["cmd_low"] <= own["cmd"] <= own["cmd_high"]
    few = hk.faithfulness(llama, clean[:5], corrupted[:5], scores, DIFF, sizes=sizes, draws=0)
    assert few.areas["cmd_low"].isna().all()
