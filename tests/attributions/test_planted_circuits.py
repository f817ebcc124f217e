"""Every scorer finds a circuit that was planted: a tiny model in which all other components write nothing."""

import random

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import hookkit as hk

DRAWS = random.Random(0)
CLEAN, CORRUPTED = (  # other tokens everywhere
    [[DRAWS.randrange(3, 60) for _ in range(6)] for _ in range(8)] for _ in range(2)
)
DIFF = hk.metrics.logit_diff(5, 7)
NODES = ["embed", "z.0.1", "mlp_out.1", "z.2.3"]
SCORERS = {
    "EAP": lambda *pairs: hk.edge_attribution(*pairs),
    "EAP-IG-inputs": lambda *pairs: hk.edge_attribution(*pairs, method="integrated"),
    "EAP-IG-activations": lambda *pairs: hk.edge_attribution(
        *pairs, method="integrated_activations", steps=2
    ),
    "exact": lambda *pairs: hk.edge_attribution(*pairs, method="exact"),
    "mask": lambda *pairs: hk.edge_mask(*pairs),
}


def plant(family):
    """A model whose heads and MLPs have no output weights, but for those of NODES."""
    lm = hk.tiny(family)
    gpt2 = family == "gpt2"
    with torch.no_grad():
        for layer, block in enumerate(lm.model.transformer.h if gpt2 else lm.model.model.layers):
            weight = block.attn.c_proj.weight if gpt2 else block.self_attn.o_proj.weight.T
            for head, rows in enumerate(weight.chunk(lm.sizes["head"])):
                if f"z.{layer}.{head}" not in NODES:
                    rows.zero_()
            if f"mlp_out.{layer}" not in NODES:
                (block.mlp.c_proj if gpt2 else block.mlp.down_proj).weight.zero_()
    return lm


def is_planted(lm, table):
    """Which edges lead from a node of the circuit to one, or to the logits."""
    readers = {"logits"}
    for node in NODES[1:]:
        kind, layer, *head = node.split(".")
        if kind == "mlp_out":
            readers.add(f"mlp_in.{layer}")
            continue
        shared = int(head[0]) * lm.sizes["kv_head"] // lm.sizes["head"]
        readers |= {f"q.{layer}.{head[0]}", f"k.{layer}.{shared}", f"v.{layer}.{shared}"}
    return table["sender"].isin(NODES) & table["receiver"].isin(readers)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scorer_ranks_the_planted_edges_first(family, scorer):
    lm = plant(family)
    table = SCORERS[scorer](lm, CLEAN, CORRUPTED, DIFF)
    planted = is_planted(lm, table)
    assert planted.sum() == 18 and len(table) > 180
    scores = table.filter(regex="_delta|mask").iloc[:, 0].abs()
    assert roc_auc_score(planted, scores) == 1
    chosen = hk.circuit(table, n=int(planted.sum())).chosen
    found = pd.MultiIndex.from_frame(chosen[["sender", "receiver"]])
    assert set(found) == set(pd.MultiIndex.from_frame(table.loc[planted, ["sender", "receiver"]]))


@pytest.mark.parametrize("method", ["gradient", "integrated", "grad_drop"])
def test_the_same_circuit_of_nodes_is_found_by_attribution(method):
    lm = plant("llama")
    settings = {"direction": "noise", "method": method}
    tables = []
    for site in ("z", "mlp_out"):
        table = hk.attribution(lm, CLEAN, CORRUPTED, site, DIFF, **settings)
        tables.append(table.assign(site=site))
    assert set(hk.circuit(pd.concat(tables), n=3).chosen["node"]) == set(NODES[1:])
