"""What every rank of a split model does in tests/models/test_tensor_parallel.py: `torchrun ranks.py FOLDER`.

Each check is done on the model that the ranks hold together and on the whole one in this very process, and both have to
come to the same. What came of it is written to FOLDER/results-N.json by rank N.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from dictionaries import random_weights, write
from transformers import AutoModelForCausalLM

import hookkit as hk
from hookkit.models.provenance import weights_hash

IDS = [[5, 9, 33, 7, 2, 61], [8, 4, 11, 6]]
OTHER = [[5, 9, 33, 7, 3, 61], [8, 4, 12, 6]]
METRIC = hk.metrics.logit_diff(17, 40)
RANK = int(os.environ.get("RANK", 0))
FOLDER = Path(sys.argv[-1])
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def has(lm, *names):
    """Those of some sites that the model has."""
    found = []
    for name in names:
        word, layer = name.split(".")[:2]
        if word in lm.layout.names and int(layer) in lm.layout.layers(word):
            found.append(name)
    return found


def sites(lm):
    run = hk.forward(lm, IDS, hk.capture(lm.sites()))
    return {"logits": run.logits, **{str(site): run[site] for site in lm.sites()}}


def edited_parts(lm):
    found = {}
    wanted = (
        "q.1",
        "k.1",
        "v.1",
        "z.1",
        "pattern.1",
        "scores.0",
        "k_rot.1",
        "mlp_post.1",
        "mlp_post.0",
        "resid_mid.1",
    )
    for site in has(lm, *wanted):
        edit = hk.edit(site, lambda values: values * 0.5, pos=slice(1, 3))
        found[site] = hk.forward(lm, IDS, edit, hk.capture("z")).logits
    return found


def ablated(lm):
    wishes = [
        hk.ablate("z.1.1"),
        hk.ablate("z.1.3"),
        hk.ablate("v.1.1"),
        hk.ablate("z.2", to="mean", over=OTHER),
    ]
    wishes += [hk.ablate("z.0", to="resample", over=OTHER, seed=3), hk.scale("pattern.1.2", 0.0)]
    for site in has(lm, "mlp_post.0", "mlp_post.2"):
        wishes += [hk.ablate(site, units=[3, 20]), hk.ablate(site, to="mean", over=OTHER)]
    return {str(each): hk.forward(lm, IDS, each).logits for each in wishes}


def patched(lm):
    names = has(lm, "z.1", "q.1", "mlp_post.0", "attn_out.1", "resid_pre.1", "v.1")
    source = hk.forward(lm, OTHER, hk.capture(names))
    return {name: hk.forward(lm, IDS, hk.patch(name, source)).logits for name in names}


def steered(lm):
    found = {}
    for site in has(lm, "resid_post.1", "z.1.2", "mlp_post.0"):
        shape = lm.shape(next(iter(lm.expand(site))))  # pyright: ignore
        vector = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found[site] = hk.forward(lm, IDS, hk.steer(site, vector)).logits
        found[f"{site} projected out"] = hk.forward(lm, IDS, hk.project_out(site, vector)).logits
    return found


def featured(lm):
    """Features of a dictionary, captured and edited, in a forward and while text is written."""
    folder = FOLDER / "dictionaries" / f"{lm.family.name}-{RANK}"
    write(folder, "topk", random_weights("topk", d=lm.sizes["d_model"]))
    own = lm.with_dictionaries(hk.load_dictionary(folder), check=False)
    features = hk.forward(own, IDS, hk.capture("feat.resid_post.1"))["feat.resid_post.1"]
    source = hk.forward(own, OTHER, hk.capture("feat.resid_post.1"))
    active = features[0, 2].topk(2).indices.tolist()
    found = {"features": features}
    for number, hook in enumerate(
        [
            hk.ablate("feat.resid_post.1", units=active),
            hk.scale(f"feat.resid_post.1.{active[0]}", -3.0, pos=slice(1, 4)),
            hk.patch("feat.resid_post.1", source),
        ]
    ):
        found[f"edit {number}"] = hk.forward(own, IDS, hook).logits
    found["text"] = hk.generate(
        own, IDS, hk.scale(f"feat.resid_post.1.{active[0]}", -3.0), **GREEDY
    ).tokens
    return found


def generated(lm):
    hooks = [hk.ablate("z.1.1"), hk.force(17, step=1), hk.capture(["k_rot", "z", "pattern"])]
    run = hk.generate(lm, IDS, *hooks, logits="all", **GREEDY)
    return {"tokens": run.tokens, **{str(site): run[site] for site in run.sites}}


def drawn(lm):
    seeded = hk.generate(lm, IDS, max_new_tokens=6, do_sample=True, seed=5)
    return {"seeded": seeded.tokens}


def traced(lm):
    run = hk.generate(
        lm, IDS[:1], hk.boost(17, by=2.0), trace=hk.trace(top=3, watch=[17]), **GREEDY
    )
    return hk.candidates(run).select_dtypes("number")


def attached(lm):
    with hk.attach(lm, hk.scale("z.1.0", 2.0), hk.capture("z.2")) as manager:
        logits = lm.model(torch.tensor(IDS[:1])).logits
    return {"logits": logits, "z": manager["z.2"]}


def modules(lm):
    path = "model.layers.1.self_attn"
    sites = [
        hk.module(f"{path}.q_proj"),
        hk.module(f"{path}.o_proj", side="input"),
        hk.module(f"{path}.o_proj"),
    ]
    run = hk.forward(lm, IDS, hk.capture(sites))
    return {str(site): run[site] for site in sites}


def lenses(lm):
    return hk.logit_lens(lm, IDS, hk.ablate("z.1.1"), pos=None, top=0, watch=[17]).select_dtypes(
        "number"
    )


def decomposed(lm):
    run = hk.forward(lm, IDS[:1], hk.capture(lm.sites()))
    neurons = bool(has(lm, "mlp_post.2"))
    table = hk.direct_logits(run, 17, against=40, heads=True, neurons=neurons)
    return table.select_dtypes("number")


def terms(lm):
    run = hk.forward(lm, IDS[:1], hk.capture("final_norm"))
    return {
        "terms": torch.tensor(hk.logit_terms(run, 17, top=32)["product"].astype(float).tolist()),
        "row": hk.unembedding(lm, 17),
    }


def differentiated(lm):
    found = hk.gradients(
        lm, IDS, METRIC, has(lm, "z.1", "z.0", "resid_pre.1", "mlp_post.0", "q.2", "pattern.1")
    )
    return {str(site): found.of(site) for site in found.sites}


def attributed(lm):
    return hk.attribution(lm, IDS, OTHER, ["z"], METRIC).select_dtypes("number")


def swept(lm):
    heads = hk.patching(lm, IDS, OTHER, "z", METRIC, progress=False)
    places = hk.patching(lm, IDS, OTHER, "resid_pre", METRIC, pos=[2, -1], progress=False)
    return pd.concat([heads, places]).select_dtypes("number")


def surprised(lm):
    return hk.surprisal(hk.forward(lm, IDS)).select_dtypes("number")


def counted(lm):
    found = hk.stats.activation_statistics(
        lm, IDS * 3, has(lm, "mlp_post.0", "z.1"), progress=False
    )
    return {
        f"{site} {what}": getattr(found[site], what)
        for site in found.sites
        for what in ("mean", "variance")
    }


def hashed(lm):
    return {"bytes": torch.tensor(list(bytes.fromhex(weights_hash(lm))))}


def harvested(lm):
    """The folder that the ranks made, read by each of them; that of the whole model is made by the first."""
    folder = FOLDER / "harvests" / f"{lm.family.name}{'' if lm.ranks else '-whole'}"
    sites = ["z.1", "mlp_out.0"]
    if lm.ranks is None and RANK:  # only the first rank writes
        folder = folder.with_name(lm.family.name)
    else:
        for _ in range(2):  # made, and gone on with
            hk.harvest(lm, IDS * 4, sites, folder, shard_size=7, batch_tokens=12, progress=False)
    made = hk.open_harvest(folder)
    return {
        **{site: made[site][:] for site in sites},
        "pos": made["pos"][:],
        "token": made["token"][:],
    }


def journalled(lm):
    """A sweep that goes on where it was; the ranks share one folder."""
    folder = FOLDER / "sweeps" / f"{lm.family.name}{'' if lm.ranks else f'-{RANK}'}"
    one = hk.ablations(lm, IDS, "z", METRIC, layers=[1], save=folder, progress=False)
    two = hk.ablations(lm, IDS, "z", METRIC, layers=[1], save=folder, progress=False)
    assert one.equals(two)
    return one.select_dtypes("number")


# ---- what only a split model can be asked


def same_draws(lm):
    """Draws without a seed are the same on every rank, and differ from call to call."""
    one, two = (hk.generate(lm, IDS, max_new_tokens=12, do_sample=True).tokens for _ in range(2))
    assert all(rank == one.tolist() for rank in lm.ranks.gather_values(one.tolist()))
    assert one.tolist() != two.tolist()


def refused(lm):
    """A tensor of which nobody knows how its parts stand to the whole."""
    inner = "self_attn.q_norm" if lm.family.name.startswith("qwen3") else "mlp.act_fn"
    try:
        hk.forward(lm, IDS, hk.capture(hk.module(f"{lm.family.block.format(layer=1)}.{inner}")))
    except hk.errors.Unsupported as error:
        assert "cannot be put together" in str(error), error
    else:
        raise AssertionError("was captured")


def one_writes(lm):
    """Files come from the first rank alone."""
    folder = FOLDER / "records" / f"{lm.family.name}-{RANK}"
    with hk.record(folder, title="Ranks", lm=lm) as results:
        results.table("ranks", hk.ranks(hk.forward(lm, IDS[:1]), top=3))
        results.tensors("z", hk.forward(lm, IDS[:1], hk.capture("z.1")))
    names = {path.name for path in folder.glob("*")}
    assert names == (
        set() if RANK else {"README.md", "about.json", "ranks.csv", "report.html", "z.safetensors"}
    ), names


def shown(lm):
    """Where the model is split stands in its description."""
    hk.forward(lm, IDS, hk.capture(lm.sites()))
    table = lm.describe().set_index("site")["split"]
    assert table["pattern"] == f"head {'+'.join(['2'] * lm.ranks.count)}", table["pattern"]
    if lm.ranks.count == 3:
        assert table["mlp_post"] == "d_mlp 17+17+16", table["mlp_post"]
    assert table["resid_post"] == ""
    if lm.family.name == "llama":
        checkup = hk.doctor(lm, layers=[1])
        assert checkup.healthy, checkup


CHECKS = [
    sites,
    edited_parts,
    ablated,
    patched,
    steered,
    featured,
    generated,
    drawn,
    traced,
    attached,
    modules,
    lenses,
    decomposed,
    terms,
    differentiated,
    attributed,
    swept,
    surprised,
    counted,
    hashed,
    harvested,
    journalled,
]
ALONE = [same_draws, refused, one_writes, shown]


def default(whole, split):
    """The default model: each site of three blocks, and a text generated under edits."""
    prompt, found = "I like oat milk in my", []
    for lm in (split, whole):
        run = hk.forward(lm, prompt, hk.capture(lm.sites(layers=[0, 14, 29])))
        text = hk.generate(lm, prompt, hk.ablate("z.17.4"), hk.boost(" coffee", by=1.0), **GREEDY)
        found.append(
            {
                "logits": run.logits,
                "text": text.tokens,
                **{str(site): run[site] for site in run.sites},
            }
        )
    return difference(*found)


def difference(found: Any, expected: Any) -> float:
    """How far two results are apart at most, as a part of the largest value of each tensor or column."""
    assert list(found) == list(expected), (list(found), list(expected))
    return max(apart(numbers(found[name]), numbers(expected[name])) for name in expected)


def numbers(values: Any) -> torch.Tensor:
    if isinstance(values, pd.Series):
        values = torch.tensor(values.astype(float).tolist())
    values = values.double().nan_to_num(0.0, 0.0, 0.0)
    return values.masked_fill(values < -1e30, 0.0)  # scores that a mask hides


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    assert one.shape == two.shape, (one.shape, two.shape)
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-3)) if two.numel() else 0.0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(RANK)  # whose draws differ from rank to rank, unless they are told
    from transformers.distributed.configuration_utils import DistributedConfig

    results: dict[str, Any] = {}
    for path in sorted((folder / "models").iterdir()):
        split = DistributedConfig(tp_plan="auto")
        lm = hk.LM(AutoModelForCausalLM.from_pretrained(path, distributed_config=split).eval())
        whole = hk.LM(AutoModelForCausalLM.from_pretrained(path).eval())
        for check in CHECKS:
            print(path.name, check.__name__, flush=True)
            try:
                results[f"{path.name} {check.__name__}"] = difference(check(lm), check(whole))
            except Exception:  # noqa: BLE001  it is what came of the check
                results[f"{path.name} {check.__name__}"] = traceback.format_exc()[-1500:]
        for check in ALONE:
            try:
                check(lm)
                results[f"{path.name} {check.__name__}"] = 0.0
            except Exception:  # noqa: BLE001  it is what came of the check
                results[f"{path.name} {check.__name__}"] = traceback.format_exc()[-1500:]
    if folder.name.startswith("default"):
        results["default"] = default(hk.load(device="cpu"), hk.load(tp_plan="auto"))
    (folder / f"results-{RANK}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
