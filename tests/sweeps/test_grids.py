"""The standard grids against plain transformers with hooks written by hand: patching, ablation, causal tracing, path
patching; controls, means over prompts, and what a plan says."""

import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager

import by_hand
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import hookkit as hk
from hookkit.errors import (
    BadArgument,
    BadHook,
    BadPrompt,
    EmptySelection,
    MissingSite,
    OutOfRange,
    UnknownKeyword,
    Unsupported,
)
from hookkit.sweeps.cells import Randomised, noise_generator
from hookkit.sweeps.patching import embedding_std

METRIC = hk.metrics.logit_diff(5, 7)
LAYERS, HEADS, WIDTH = range(3), range(4), 8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def small(request) -> hk.LM:
    """A model that no test changes."""
    return hk.tiny(request.param)


@pytest.fixture(scope="module")
def llama_ids() -> hk.LM:
    """The same of one family, for what does not depend on the family."""
    return hk.tiny("llama")


def pair(*lengths: int, differ: int = 3, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Clean and corrupted prompts of these lengths, which differ in one token."""
    draws = torch.Generator().manual_seed(seed)
    clean = [torch.randint(3, 320, (length,), generator=draws).tolist() for length in lengths]
    return clean, [[*row[:differ], (row[differ] + 1) % 320, *row[differ + 1 :]] for row in clean]


CLEAN, CORRUPTED = pair(8, 6)


def difference(logits: Tensor) -> float:
    return float(logits[0, -1, 5] - logits[0, -1, 7])


def plain(lm: hk.LM, ids: list[int]) -> float:
    return difference(by_hand.logits(lm.model, ids))


# ---- the second route: several hooks at once


Edits = Iterable[tuple[str, int | None, Callable[[Tensor], Tensor]]]


@contextmanager
def edited(lm: hk.LM, edits: Edits):
    """Hooks written by hand at several sites; each edits the whole tensor of its module."""
    with ExitStack() as stack:
        for site, layer, edit in edits:
            module, side, _ = by_hand.module_of(lm.model, site, layer)
            stack.enter_context(by_hand.with_hook(module, side, edit))
        yield


def run(lm: hk.LM, ids: list[int], edits: Edits = ()) -> float:
    """The metric of the plain model with these hooks."""
    with edited(lm, edits):
        return plain(lm, ids)


def raw(lm: hk.LM, ids: list[int], site: str, layer: int | None, edits: Edits = ()) -> Tensor:
    """The whole tensor of the module at a site, in the plain model with these hooks."""
    return seen(lm, tuple(ids), site, layer, tuple(edits))


@functools.lru_cache(1000)
def seen(lm: hk.LM, ids: tuple[int, ...], site: str, layer: int | None, edits: Edits) -> Tensor:
    module, side, _ = by_hand.module_of(lm.model, site, layer)
    found = []

    def keep(values: Tensor) -> Tensor:
        found.append(values.clone())
        return values

    with edited(lm, edits), by_hand.with_hook(module, side, keep):
        by_hand.logits(lm.model, list(ids))
    return found[0]


def part(lm: hk.LM, site: str, head: int | None) -> slice:
    """Where a head stands in the last axis of its module's tensor."""
    if head is None:
        return slice(None)
    first = 32 * "qkv".index(site) if site in "qkv" and lm.config.model_type == "gpt2" else 0
    return slice(first + WIDTH * head, first + WIDTH * (head + 1))


def put(values: Tensor, pos=slice(None), where: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """An edit that puts in these values at some positions."""

    def edit(found: Tensor) -> Tensor:
        found = found.clone()
        found[:, pos, where] = values[:, pos, where]
        return found

    return edit


# ---- patching


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_each_position_of_several_sites(small, direction):
    sites = ["resid_pre", "attn_out", "mlp_out"]
    table = hk.patching(small, CLEAN, CORRUPTED, sites, METRIC, direction=direction, layers=[0, 2])
    to, of = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    assert list(table.columns) == [
        *("site", "layer", "pos", "row", "logit_diff", "logit_diff_before", "logit_diff_delta"),
        *("logit_diff_target", "logit_diff_effect"),
    ]
    assert len(table) == 3 * 2 * 6 * 2 and sorted(set(table["pos"])) == [-6, -5, -4, -3, -2, -1]
    for site, layer, pos, row, found in table.iloc[:, :5].itertuples(index=False):
        values = raw(small, of[row], site, layer)
        assert found == pytest.approx(
            run(small, to[row], [(site, layer, put(values, pos))]), abs=1e-4
        )
    for row, group in table.groupby("row"):
        start, goal = plain(small, to[row]), plain(small, of[row])
        assert group["logit_diff_before"].tolist() == pytest.approx([start] * len(group), abs=1e-4)
        effect = (group["logit_diff"] - start) / (goal - start)
        assert group["logit_diff_effect"].tolist() == pytest.approx(effect.tolist(), abs=1e-3)
        assert group["logit_diff_effect"].max() > 0.5


@pytest.mark.parametrize("site", ["z", "q", "v"])
def test_patching_each_head_at_all_positions_and_at_some(small, site):
    table = hk.patching(small, CLEAN, CORRUPTED, site, METRIC)
    heads = 2 if site == "v" and small.config.model_type == "llama" else 4
    assert len(table) == 3 * heads * 2 and "pos" not in table.columns
    places = hk.patching(small, CLEAN, CORRUPTED, site, METRIC, layers=[1], heads=[1], pos=[-1, -3])
    assert places[["layer", "head", "pos"]].drop_duplicates().values.tolist() == [
        [1, 1, -1],
        [1, 1, -3],
    ]
    for each in (table.assign(pos=None), places):
        for layer, head, pos, row, found in each[
            ["layer", "head", "pos", "row", "logit_diff"]
        ].itertuples(index=False):
            values = raw(small, CLEAN[row], site, layer)
            edit = put(values, slice(None) if pos is None else pos, part(small, site, head))
            assert found == pytest.approx(
                run(small, CORRUPTED[row], [(site, layer, edit)]), abs=1e-4
            )


def test_a_site_that_is_there_once_has_no_layer(llama_ids):
    table = hk.patching(llama_ids, CLEAN, CORRUPTED, "embed", METRIC, pos=[3, -1])
    assert list(table.columns[:2]) == ["pos", "row"] and "layer" not in table
    effects = table.set_index("pos")["logit_diff_effect"]
    assert effects[3].tolist() == pytest.approx([1, 1], abs=1e-3), (
        "the token that differs is all that differs"
    )
    assert effects[-1].tolist() == pytest.approx([0, 0], abs=1e-3)


def test_positions_may_have_names_and_be_each_prompts_own(llama_ids):
    names = {"differs": 3, "last": -1, "own": [2, 4], "span": [[2, 3], 5], "text": slice(3, 5)}
    table = hk.patching(llama_ids, CLEAN, CORRUPTED, "resid_post", METRIC, layers=[1], pos=names)
    own = {
        "differs": [3, 3],
        "last": [7, 5],
        "own": [2, 4],
        "span": [[2, 3], [5]],
        "text": [[3, 4], [3, 4]],
    }
    assert list(dict.fromkeys(table["pos"])) == list(names)
    for name, row, found in table[["pos", "row", "logit_diff"]].itertuples(index=False):
        values = raw(llama_ids, CLEAN[row], "resid_post", 1)
        wanted = run(llama_ids, CORRUPTED[row], [("resid_post", 1, put(values, own[name][row]))])
        assert found == pytest.approx(wanted, abs=1e-4), (name, row)
    listed = hk.patching(
        llama_ids, CLEAN, CORRUPTED, "resid_post", METRIC, layers=[1], pos=[slice(3, 5), (2, 3)]
    )
    assert [str(each) for each in dict.fromkeys(listed["pos"])] == ["3:5", "(2, 3)"]
    text = table[table["pos"] == "text"]["logit_diff"].tolist()
    assert listed["logit_diff"].tolist()[:2] == pytest.approx(
        text, abs=1e-5
    )  # in a batch of another size


def test_the_settings_of_a_sweep_are_those_of_a_grid(llama_ids, tmp_path):
    under = [hk.ablate("z.0.1")]
    settings = {
        "base_hooks": under,
        "control": "random",
        "draws": 1,
        "save": tmp_path,
        "progress": False,
        "memory": 10**8,
        "verify": 3,
    }
    table = hk.patching(
        llama_ids, CLEAN, CORRUPTED, "resid_post", METRIC, layers=[1], pos=[-1, 3], **settings
    )
    assert table["control"].sum() == 4 and (tmp_path / "table.csv").exists()
    cut = [("z", 0, lambda values: values.clone().index_fill_(2, torch.arange(8, 16), 0))]
    for pos, row, found, before, effect in table[~table["control"]][
        ["pos", "row", "logit_diff", "logit_diff_before", "logit_diff_effect"]
    ].itertuples(index=False):
        values = raw(llama_ids, CLEAN[row], "resid_post", 1, cut)  # the source and the target, too
        assert found == pytest.approx(
            run(llama_ids, CORRUPTED[row], [*cut, ("resid_post", 1, put(values, pos))]), abs=1e-4
        )
        assert before == pytest.approx(run(llama_ids, CORRUPTED[row], cut), abs=1e-4)
        goal = run(llama_ids, CLEAN[row], cut)
        assert effect == pytest.approx((found - before) / (goal - before), abs=1e-3)


def test_the_loss_of_a_continuation_may_be_patched_for(llama_ids):
    behind = (8, 9)
    table = hk.patching(
        llama_ids,
        CLEAN[:1],
        CORRUPTED[:1],
        "resid_post",
        hk.metrics.loss(behind),
        layers=[1],
        pos=[3, -1],
    )

    def loss(ids: list[int]) -> float:
        said = by_hand.logits(llama_ids.model, [*ids, behind[0]])[0, -2:].log_softmax(-1)
        return -float(said[0, behind[0]] + said[1, behind[1]]) / 2

    start, goal = loss(CORRUPTED[0]), loss(CLEAN[0])
    for pos, found, before, effect in table[
        ["pos", "loss", "loss_before", "loss_effect"]
    ].itertuples(index=False):
        place = pos % 8
        values = raw(llama_ids, [*CLEAN[0], behind[0]], "resid_post", 1)
        with edited(llama_ids, [("resid_post", 1, put(values, place))]):
            wanted = loss(CORRUPTED[0])
        assert (found, before) == pytest.approx((wanted, start), abs=1e-4)
        assert effect == pytest.approx((wanted - start) / (goal - start), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"corrupted": CORRUPTED[:1]},
            BadPrompt,
            r"prompts of \[8, 6\] tokens are to be patched into prompts of \[8\]",
        ),
        ({"corrupted": [CORRUPTED[0], CORRUPTED[1][:-1]]}, BadPrompt, "as long as one another"),
        ({"direction": "up"}, BadArgument, "direction='up'"),
        ({"sites": ["resid_pre", "z"]}, Unsupported, "some have heads and some do not"),
        ({"sites": ["resid_pre", "embed"]}, Unsupported, "some have no layers and some do not"),
        ({"sites": "resid_mis"}, hk.errors.UnknownSite, "resid_mid"),
        ({"heads": [1]}, BadHook, r"heads=\[1\]: resid_pre has no heads"),
        ({"sites": "embed", "layers": [1]}, BadHook, r"layers=\[1\]: embed has no layers"),
        ({"layers": 1}, BadHook, "layers is 1, one value, and a grid has a list of them"),
        ({"layers": [3]}, OutOfRange, "the model has 3 layers"),
        ({"sites": "z", "heads": [4]}, (OutOfRange, hk.errors.NotCaptured), "head 4|z.0.4"),
        ({"pos": -1}, BadHook, r"pos is -1, one value, and a grid has a list of them: \[-1\]"),
        ({"pos": hk.at("a")}, BadHook, "one value, and a grid has a list"),
        ({"pos": []}, EmptySelection, "dimension 'pos' is empty"),
        ({"pos": ["a"]}, BadHook, "pos='a' is not valid"),
        (
            {"pos": {"end": [1, 2, 3]}},
            BadPrompt,
            "the position 'end' is given for 3 prompts, and there are 2",
        ),
        ({"pos": [7]}, OutOfRange, "position 7 of row 1"),
        ({"verfy": 1}, UnknownKeyword, "patching.. has no keyword 'verfy'; did you mean 'verify'"),
        ({"target": CLEAN}, UnknownKeyword, "has no keyword 'target'"),
    ],
)
def test_a_mistake_in_a_grid_says_what_to_do(llama_ids, change, error, words):
    given = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "sites": "resid_pre",
        "metrics": METRIC,
    } | change
    with pytest.raises(error, match=words):
        hk.patching(llama_ids, **given)


# ---- ablations


def test_ablating_to_zero_and_to_the_mean_of_other_prompts(small):
    others = pair(8, 8, 7, seed=5)[0]
    for to, over in (("zero", None), ("mean", others)):
        table = hk.ablations(small, CLEAN, "z", METRIC, to=to, over=over)
        assert len(table) == 3 * 4 * 2
        for layer, head, row, found in table[["layer", "head", "row", "logit_diff"]].itertuples(
            index=False
        ):
            ids = CLEAN[row]
            values = torch.zeros(1, len(ids), 32)
            for pos in range(len(ids)) if to == "mean" else ():
                there = [raw(small, each, "z", layer)[0, pos] for each in others if len(each) > pos]
                values[0, pos] = torch.stack(there).mean(0)
            wanted = run(small, ids, [("z", layer, put(values, where=part(small, "z", head)))])
            assert found == pytest.approx(wanted, abs=1e-4)


def test_ablating_to_the_value_of_another_prompt(small):
    others = pair(8, 9, 10, seed=5)[0]
    table = hk.ablations(small, CLEAN, "mlp_out", METRIC, to="resample", over=others)
    for layer, row, found in table[["layer", "row", "logit_diff"]].itertuples(index=False):
        count = len(CLEAN[row])
        values = [raw(small, each, "mlp_out", layer)[:, :count] for each in others]
        choices = [run(small, CLEAN[row], [("mlp_out", layer, put(each))]) for each in values]
        assert min(abs(found - choice) for choice in choices) < 1e-4
    alone = hk.ablations(small, CLEAN[1:], "mlp_out", METRIC, to="resample", over=others)
    assert alone["logit_diff"].tolist() == pytest.approx(
        table[table["row"] == 1]["logit_diff"].tolist(), abs=1e-4
    )


def test_ablating_to_a_run_and_at_some_positions(small):
    source = hk.forward(small, CORRUPTED, hk.capture("attn_out"))
    table = hk.ablations(small, CLEAN, "attn_out", METRIC, to=source, pos={"own": [3, 4]})
    for layer, row, found in table[["layer", "row", "logit_diff"]].itertuples(index=False):
        values = raw(small, CORRUPTED[row], "attn_out", layer)
        assert found == pytest.approx(
            run(small, CLEAN[row], [("attn_out", layer, put(values, [3, 4][row]))]), abs=1e-4
        )


def test_leaving_out_each_block(small):
    table = hk.ablations(small, CLEAN, "block", METRIC, layers=[0, 2])
    for layer, row, found in table[["layer", "row", "logit_diff"]].itertuples(index=False):
        before = raw(small, CLEAN[row], "resid_pre", layer)
        assert found == pytest.approx(
            run(small, CLEAN[row], [("resid_post", layer, lambda _, b=before: b)]), abs=1e-4
        )


def test_ablating_single_neurons(small):
    for units, wanted in (
        ([1, 40], [(0, 1), (0, 40), (2, 1), (2, 40)]),
        ({0: [7], 2: [1]}, [(0, 7), (2, 1)]),
    ):
        table = hk.ablations(small, CLEAN[:1], "mlp_post", METRIC, layers=[0, 2], units=units)
        assert list(table[["layer", "unit"]].itertuples(index=False, name=None)) == wanted
        for layer, unit, found in table[["layer", "unit", "logit_diff"]].itertuples(index=False):
            cut = [
                (
                    "mlp_post",
                    layer,
                    lambda values, u=unit: values.clone().index_fill_(2, torch.tensor([u]), 0),
                )
            ]
            assert found == pytest.approx(run(small, CLEAN[0], cut), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"what": "block", "to": "mean"}, BadHook, "a block is left out as a whole"),
        ({"what": "block", "heads": [1]}, BadHook, "a block is left out as a whole"),
        (
            {"what": "mlp_post", "units": {5: [1]}, "layers": [0]},
            BadHook,
            r"units= names layer 5, and the grid has the layers \[0\]",
        ),
        ({"what": "mlp_post", "units": [4800]}, OutOfRange, "4800"),
        ({"what": "mlp_post", "units": []}, EmptySelection, "'unit' is empty"),
        ({"what": "z", "to": "mean"}, BadHook, "needs a reference"),
        ({"what": "router_logits"}, MissingSite, "has no 'router_logits'"),
    ],
)
def test_a_mistake_in_an_ablation_says_what_to_do(llama_ids, change, error, words):
    with pytest.raises(error, match=words):
        hk.ablations(llama_ids, CLEAN, metrics=METRIC, **change)


# ---- causal tracing


TEXTS, SUBJECTS = (
    ["Mary and John went to the store", "The coffee is in the city of Paris"],
    ["John", "coffee"],
)


def traced(lm: hk.LM, **settings) -> pd.DataFrame:
    return hk.causal_tracing(lm, TEXTS, SUBJECTS, METRIC, samples=3, seed=4, **settings)


@pytest.mark.parametrize(
    ("site", "window"), [("resid_post", 1), ("mlp_out", 2), ("attn_out", 3), ("mlp_out", 10)]
)
def test_causal_tracing_restores_clean_states_under_noise_on_the_subject(lm, site, window):
    table = traced(lm, site=site, window=window, noise=2.0, pos=[-1, -4], layers=[0, 1, 2])
    assert list(table.columns[:3]) == ["layer", "pos", "row"] and list(table.columns[-2:]) == [
        "prompt",
        "sample",
    ]
    assert (
        len(table) == 3 * 2 * 2 * 3
        and table["row"].tolist() == (table["prompt"] * 3 + table["sample"]).tolist()
    )
    for (prompt, sample), group in table.groupby(["prompt", "sample"]):
        ids = lm.encode(TEXTS[prompt])
        noise = blur(lm, prompt, ids, sample, 2.0)
        start, goal = run(lm, ids, [noise]), run(lm, ids)
        for layer, pos, found, effect in group[
            ["layer", "pos", "logit_diff", "logit_diff_effect"]
        ].itertuples(index=False):
            first = layer - window // 2  # as in the authors' code, cut off at the ends
            around = range(max(0, first), min(3, first + window))
            back = [(site, each, put(raw(lm, ids, site, each), pos)) for each in around]
            wanted = run(lm, ids, [noise, *back])
            assert found == pytest.approx(wanted, abs=1e-4)
            assert effect == pytest.approx((wanted - start) / (goal - start), abs=1e-2)


def blur(lm: hk.LM, prompt: int, ids: list[int], sample: int, noise: float):
    """The hook by hand that adds the noise of a sample to the subject's embeddings."""
    span = [n for n in range(len(ids)) if covers(lm, ids, n, SUBJECTS[prompt])]
    kept = noise_generator(4, tuple(ids), sample)
    size = noise * lm.model.get_input_embeddings().weight[: lm.n_tokens].std()
    drawn = size * torch.randn(len(span), 32, generator=kept)

    def add(values: Tensor) -> Tensor:
        values = values.clone()
        values[0, span] += drawn
        return values

    return "embed", None, add


def covers(lm: hk.LM, ids: list[int], place: int, text: str) -> bool:
    """True if a token has part of a text in it."""
    start = lm.text(ids).index(text)
    return len(lm.text(ids[: place + 1])) > start and len(lm.text(ids[:place])) < start + len(text)


def test_a_map_says_over_what_it_is_a_mean(lm):
    table = traced(lm, pos=[-2, -1], layers=[0, 1])
    for shown, words in (
        (table, ", mean of 2 prompts x 3 draws of noise"),
        (hk.stats.mean_over_prompts(table), ", mean of 2 prompts"),
        (table[table["prompt"] == 0], ", mean of 3 draws of noise"),
        (table.drop(columns="sample"), ", mean of 6 prompts"),
        (table[table["row"] == 0], ""),
    ):
        label = hk.figures.heat_map(shown).axes[-1].get_ylabel().replace("\n", " ")
        effect = "logit difference effect (0: no change, 1: as in the target)"
        assert label.removesuffix("; 0 is the centre") == f"{effect}{words}"


def test_noise_is_the_same_alone_and_among_others_and_another_in_each_sample(lm):
    both = traced(lm, pos=[-2], layers=[1])
    alone = hk.causal_tracing(
        lm, TEXTS[1], SUBJECTS[1], METRIC, samples=3, seed=4, pos=[-2], layers=[1]
    )
    assert alone["logit_diff"].tolist() == pytest.approx(
        both[both["prompt"] == 1]["logit_diff"].tolist(), abs=1e-4
    )
    assert both["logit_diff_before"].round(6).nunique() == 6
    other = hk.causal_tracing(
        lm, TEXTS[1], SUBJECTS[1], METRIC, samples=3, seed=5, pos=[-2], layers=[1]
    )
    assert (other["logit_diff_before"] - alone["logit_diff_before"]).abs().min() > 1e-3


def test_each_token_of_the_subject_has_its_own_noise_and_no_other_token_has_any(llama):
    text, subject = "The coffee is in the city of Paris", "the city of"
    ids = llama.encode(text)
    plain = raw(llama, ids, "embed", None)[0]
    seen = []
    handle = llama.model.model.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(
            (args[0] if args else kwargs["hidden_states"]).detach().clone()
        ),
        with_kwargs=True,
    )
    settings = {"samples": 4, "noise": 2.0, "layers": [1], "pos": [-1]}
    hk.causal_tracing(llama, text, subject, METRIC, **settings)
    handle.remove()
    noises = [
        values - plain for batch in seen if batch.shape[1:] == plain.shape for values in batch
    ]
    noises = torch.stack([noise for noise in noises if noise.abs().max() > 0])
    span = [n for n in range(len(ids)) if covers(llama, ids, n, subject)]
    assert len(span) > 2
    outside = [n for n in range(len(ids)) if n not in span]
    assert (noises[:, outside] == 0).all()
    blurred = noises[:, span].flatten(0, 1).unique(dim=0)
    assert len(blurred) == 4 * len(span), "one draw for each sample and token"
    unit = blurred / blurred.norm(dim=-1, keepdim=True)
    assert (unit @ unit.T - torch.eye(len(unit))).abs().max() < 0.9


def test_the_noise_of_causal_tracing_is_one_number_for_a_model(llama):
    """The standard deviation of the vocabulary's embeddings, or of the tokens of other texts: not of the prompt."""
    vocabulary = llama.model.get_input_embeddings().weight[: llama.n_tokens].detach().double()
    subjects = torch.cat(
        [vocabulary[llama.tokenizer.encode(text)] for text in ("Paris", "coffee and milk")]
    )
    settings = {"samples": 1, "pos": [-1], "layers": [1]}
    for text, subject in zip(TEXTS, SUBJECTS, strict=True):
        table = hk.causal_tracing(llama, text, subject, METRIC, noise=2.0, **settings)
        assert table.attrs["noise_std"] == pytest.approx(2.0 * float(vocabulary.std()), rel=1e-6)
        table = hk.causal_tracing(
            llama, text, subject, METRIC, noise_over=["Paris", "coffee and milk"], **settings
        )
        assert table.attrs["noise_std"] == pytest.approx(3.0 * float(subjects.std()), rel=1e-6)


def test_the_noise_of_a_scaled_embedding_is_that_of_what_the_model_reads():
    lm = hk.tiny("gemma")  # its embedding module multiplies by the root of d_model
    read = lm.model.model.embed_tokens(torch.arange(lm.n_tokens)).detach().double()
    assert embedding_std(lm) == pytest.approx(float(read.std()), rel=1e-6)


def test_causal_tracing_under_other_hooks_and_at_named_positions(llama):
    cut = [("z", 0, lambda values: values.clone().index_fill_(2, torch.arange(8, 16), 0))]
    table = traced(
        llama, base_hooks=[hk.ablate("z.0.1")], layers=[1], pos={"subject": [3, 2], "end": -1}
    )
    for prompt, sample, pos, found in table[["prompt", "sample", "pos", "logit_diff"]].itertuples(
        index=False
    ):
        ids = llama.encode(TEXTS[prompt])
        place = -1 if pos == "end" else [3, 2][prompt]
        back = ("resid_post", 1, put(raw(llama, ids, "resid_post", 1, cut), place))
        noise = blur(llama, prompt, ids, sample, 3.0)
        assert found == pytest.approx(run(llama, ids, [noise, *cut, back]), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"subject": ["John"]}, BadPrompt, "1 subjects were given, and there are 2 prompts"),
        ({"subject": ["John", "tea"]}, OutOfRange, r"at\('tea'\) was asked for"),
        ({"samples": 0}, BadHook, "samples=0 and window=1: both count from 1"),
        ({"window": 0}, BadHook, "both count from 1"),
        ({"site": "embed"}, BadHook, "'embed' is there once"),
        ({"site": "z"}, BadHook, "'z' has heads, all of which are restored together"),
        ({"layers": [7]}, OutOfRange, "the model has 3 layers"),
        ({"target": TEXTS}, UnknownKeyword, "has no keyword 'target'"),
    ],
)
def test_a_mistake_in_causal_tracing_says_what_to_do(llama, change, error, words):
    given = {"prompts": TEXTS, "subject": SUBJECTS, "metrics": METRIC} | change
    with pytest.raises(error, match=words):
        hk.causal_tracing(llama, **given)


# ---- path patching


def path(
    lm, clean, corrupted, sender, receivers, freeze, pos=slice(None), before: Edits = ()
) -> float:
    """Path patching by hand: the sender's value of the corrupted prompt in the clean one, all that is frozen behind it
    held; then what the receivers read is put into a second run. Hooks `before` act in every run."""
    site, layer, head = sender
    before = list(before)
    sent = raw(lm, corrupted, site, layer, before)
    held = []
    for name in freeze:
        order = ("z", "attn_out", "mlp_out")
        later = [
            n
            for n in LAYERS
            if n > layer or (n == layer and name == "mlp_out" and order.index(site) < 2)
        ]
        held += [(name, n, put(raw(lm, clean, name, n, before))) for n in later]
    first = [*before, (site, layer, put(sent, pos, part(lm, site, head))), *held]
    if not receivers:
        return run(lm, clean, first)
    second = []
    for name, number, which in receivers:
        second.append(
            (name, number, put(raw(lm, clean, name, number, first), where=part(lm, name, which)))
        )
    return run(lm, clean, [*before, *second])


@pytest.mark.parametrize("freeze", [("z",), ("z", "mlp_out")])  # as in the paper; the stream alone
@pytest.mark.parametrize(
    "receivers",
    [
        (),
        (("q", 2, 1),),
        (("q", 2, 0), ("q", 2, 3), ("q", 1, 2)),
        (("k", 2, 1), ("v", 1, 0)),
        (("mlp_in", 2, None),),
    ],
)
def test_path_patching_of_each_head(small, receivers, freeze):
    named = [hk.Site(*each) for each in receivers] or None
    heads = [0, 3] if named else None
    table = hk.path_patching(
        small, CLEAN, CORRUPTED, METRIC, receivers=named, freeze=freeze, heads=heads
    )
    assert list(table.columns[:4]) == ["layer", "head", "row", "logit_diff"]
    assert len(table) == 3 * len(heads or HEADS) * 2
    for layer, head, row, found in table[["layer", "head", "row", "logit_diff"]].itertuples(
        index=False
    ):
        wanted = path(small, CLEAN[row], CORRUPTED[row], ("z", layer, head), receivers, freeze)
        assert found == pytest.approx(wanted, abs=1e-4), (layer, head, row)
    assert table["logit_diff_delta"].abs().max() > 1e-3
    goal, start = plain(small, CORRUPTED[0]), plain(small, CLEAN[0])
    one = table[table["row"] == 0]
    assert one["logit_diff_effect"].tolist() == pytest.approx(
        ((one["logit_diff"] - start) / (goal - start)).tolist(), abs=1e-2
    )


@pytest.mark.parametrize(
    ("senders", "freeze"),
    [("mlp_out", ("z",)), ("attn_out", ("z", "mlp_out")), ("mlp_out", ("z", "mlp_out"))],
)
def test_path_patching_of_whole_layers_at_some_positions(small, senders, freeze):
    receivers = (("q", 2, 1), ("mlp_in", 1, None))
    table = hk.path_patching(
        small, CLEAN, CORRUPTED, METRIC, senders=senders, receivers=[hk.Site(*each) for each in receivers], freeze=freeze,
        pos={"differs": 3, "last": [7, 5]},
    )  # fmt: skip
    assert list(table.columns[:3]) == ["layer", "pos", "row"]
    for layer, pos, row, found in table[["layer", "pos", "row", "logit_diff"]].itertuples(
        index=False
    ):
        place = {"differs": 3, "last": -1}[pos]
        wanted = path(
            small, CLEAN[row], CORRUPTED[row], (senders, layer, None), receivers, freeze, place
        )
        assert found == pytest.approx(wanted, abs=1e-4), (layer, pos, row)


def test_path_patching_under_other_hooks(small):
    cut = [("z", 0, lambda values: values.clone().index_fill_(2, torch.arange(8, 16), 0))]
    for receivers in ((), (("q", 2, 1),)):
        table = hk.path_patching(
            small, CLEAN, CORRUPTED, METRIC, receivers=[hk.Site(*each) for each in receivers] or None, heads=[0, 2],
            base_hooks=[hk.ablate("z.0.1")],
        )  # fmt: skip
        for layer, head, row, found in table[["layer", "head", "row", "logit_diff"]].itertuples(
            index=False
        ):
            wanted = path(
                small, CLEAN[row], CORRUPTED[row], ("z", layer, head), receivers, ("z",), before=cut
            )
            assert found == pytest.approx(wanted, abs=1e-4), (layer, head, row)


def test_path_patching_of_a_little_memory_and_without_shortcuts_is_the_same(llama_ids):
    given = {"receivers": [hk.Site("q", 2, 1)], "heads": [0, 3]}
    wanted = hk.path_patching(llama_ids, CLEAN, CORRUPTED, METRIC, **given)
    little = hk.path_patching(llama_ids, CLEAN, CORRUPTED, METRIC, memory=60_000, **given)
    alone = hk.LM(llama_ids.model)
    handle = alone.model.register_forward_hook(
        lambda module, args, output: None
    )  # one of the user's own
    by_cell = hk.path_patching(alone, CLEAN, CORRUPTED, METRIC, **given)
    handle.remove()
    for found in (little, by_cell):
        assert found["logit_diff"].tolist() == pytest.approx(
            wanted["logit_diff"].tolist(), abs=1e-4
        )


def test_the_loss_may_be_patched_along_a_path(llama_ids):
    for receivers in (None, [hk.Site("q", 2, 1)]):
        table = hk.path_patching(
            llama_ids, CLEAN, CORRUPTED, [hk.metrics.loss((8, 9, 10)), METRIC], receivers=receivers
        )
        lone = hk.path_patching(llama_ids, CLEAN, CORRUPTED, METRIC, receivers=receivers)
        assert table["logit_diff"].tolist() == pytest.approx(lone["logit_diff"].tolist(), abs=1e-4)
        assert table["loss_delta"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"senders": "q"},
            BadHook,
            "'q' adds nothing to the residual stream by itself: name some of z, attn_out",
        ),
        ({"freeze": ("resid_post",)}, BadHook, "'resid_post' adds nothing"),
        ({"freeze": ()}, BadHook, "that is hk.patching"),
        ({"receivers": ["embed"]}, BadHook, "embed is no receiver: name what a block reads"),
        ({"receivers": ["z.2"]}, BadHook, "z.2 is no receiver"),
        ({"receivers": ["q.9.1"]}, OutOfRange, "the model has 3 layers"),
        ({"corrupted": CORRUPTED[:1]}, BadPrompt, "as long as one another"),
    ],
)
def test_a_mistake_in_path_patching_says_what_to_do(llama_ids, change, error, words):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metrics": METRIC} | change
    with pytest.raises(error, match=words):
        hk.path_patching(llama_ids, **given)


# ---- controls


@pytest.mark.parametrize(
    "hook",
    [
        hk.steer("resid_post.1", torch.linspace(-1, 1, 32), scale=3.0),
        hk.ablate("z.1.2", pos=[-1, -2]),
        hk.scale("mlp_out.0", 0.2, rows=1),
        hk.project_out("resid_pre.2", torch.linspace(-1, 1, 32)),
        hk.skip_block(1),
    ],
)
def test_a_random_control_changes_as_much_in_another_direction(llama_ids, hook):
    site = hook.sites[0]

    def change(hook):
        found = hk.forward(
            llama_ids, CLEAN, hk.capture(site, name="was"), hook, hk.capture(site, name="now")
        )
        return (found[site, "now"] - found[site, "was"]).flatten(0, 1)

    random = Randomised(hook.sites, hook.where, hook)
    real, control = change(hook), change(random)
    assert control.norm(dim=-1).tolist() == pytest.approx(
        real.norm(dim=-1).tolist(), rel=1e-3, abs=1e-5
    )
    changed = real.norm(dim=-1) > 1e-4
    assert torch.cosine_similarity(real[changed], control[changed]).abs().max() < 0.95
    assert (
        hk.types.Hook.from_json(random.to_json()) == random and str(random) == f"randomised({hook})"
    )


def test_a_random_control_has_a_direction_of_its_own_at_each_position_prompt_site_and_seed(
    llama_ids,
):
    def directions(layer, seed):
        real = hk.steer(hk.Site("resid_post", layer), torch.linspace(-1, 1, 32))
        random = Randomised(real.sites, real.where, real, seed)
        site = hk.Site("resid_post", layer)
        found = hk.forward(
            llama_ids, CLEAN, hk.capture(site, name="was"), random, hk.capture(site, name="now")
        )
        change = found[site, "now"] - found[site, "was"]
        return torch.cat([change[0, :8], change[1, :6]])

    first = torch.cat([directions(1, 0), directions(0, 0), directions(1, 1)])
    unit = first / first.norm(dim=-1, keepdim=True)
    alike = unit @ unit.T - torch.eye(len(unit))
    assert alike.abs().max() < 0.8, "any two of 42 directions in 32 dimensions are apart"
    assert torch.equal(directions(1, 0), first[:14]), "the same seed gives the same directions"


def test_a_control_is_a_second_row_of_each_cell_the_same_alone_and_in_a_batch(llama_ids):
    def cut(prompts):
        grid = {"layer": [0, 1], "pos": [-1, -2]}
        hooks = lambda layer, pos: hk.ablate(hk.Site("mlp_out", layer), pos=pos)  # noqa: E731
        return hk.sweep(
            llama_ids, prompts, grid, hooks, METRIC, control="random", draws=3, verify=3
        )

    table = cut(CLEAN)
    assert table["control"].tolist() == [False] * 8 + [True] * 24
    assert table["draw"].tolist() == [0] * 8 + [0] * 8 + [1] * 8 + [2] * 8
    values = table["logit_diff"].to_numpy().reshape(4, 8)
    for one, other in itertools.combinations(values, 2):
        assert (np.abs(one - other) > 1e-4).all(), "each draw is another edit"
    for row, ids in enumerate(CLEAN):
        assert cut([ids])["logit_diff"].tolist() == pytest.approx(
            table[table["row"] == row]["logit_diff"].tolist(), abs=1e-4
        )


def test_a_random_control_of_a_block_that_is_left_out_runs_by_itself_too(llama_ids):
    def kept(layer):
        return Randomised(
            hk.skip_block(layer).sites, hk.skip_block(layer).where, hk.skip_block(layer)
        )

    alone = hk.sweep(llama_ids, CLEAN, {"layer": LAYERS}, kept, METRIC)
    both = hk.ablations(llama_ids, CLEAN, "block", METRIC, control="random", draws=1)
    assert alone["logit_diff"].tolist() == pytest.approx(
        both[both["control"]]["logit_diff"].tolist(), abs=1e-4
    )


def test_a_resampled_control_patches_from_the_next_prompt(small):
    clean, corrupted = pair(8, 8, 8)
    table = hk.patching(
        small, clean, corrupted, "resid_post", METRIC, layers=[1], pos=[3, -1], control="resample"
    )
    assert table["control"].sum() == 6 * 2 and set(table["draw"]) == {0, 1}
    columns = ["pos", "row", "control", "draw", "logit_diff"]
    for pos, row, control, draw, found in table[columns].itertuples(index=False):
        source = clean[(row + control * (1 + draw)) % 3]
        edit = ("resid_post", 1, put(raw(small, source, "resid_post", 1), pos))
        assert found == pytest.approx(run(small, corrupted[row], [edit]), abs=1e-4)


def test_a_resampled_control_of_whole_prompts_takes_the_next_of_the_same_length(small):
    clean, corrupted = pair(8, 7, 8, 7)
    patch = hk.patch("attn_out.1", hk.forward(small, clean, hk.capture("attn_out.1")))
    table = hk.sweep(small, corrupted, {"n": [0]}, lambda n: patch, METRIC, control="resample")
    for row, control, found in table[["row", "control", "logit_diff"]].itertuples(index=False):
        source = clean[(row + 2 * control) % 4]
        edit = ("attn_out", 1, put(raw(small, source, "attn_out", 1)))
        assert found == pytest.approx(run(small, corrupted[row], [edit]), abs=1e-4)


def test_a_control_may_be_a_function_and_leave_cells_out(llama_ids):
    def control(layer):
        return None if layer == 0 else hk.ablate(hk.Site("attn_out", layer))

    table = hk.sweep(
        llama_ids,
        CLEAN,
        {"layer": LAYERS},
        lambda layer: hk.ablate(hk.Site("mlp_out", layer)),
        METRIC,
        control=control,
    )
    assert table[table["control"]]["layer"].tolist() == [1, 1, 2, 2]
    for layer, row, control, found in table[["layer", "row", "control", "logit_diff"]].itertuples(
        index=False
    ):
        site = "attn_out" if control else "mlp_out"
        assert found == pytest.approx(
            run(llama_ids, CLEAN[row], [(site, layer, torch.zeros_like)]), abs=1e-4
        )


@pytest.mark.parametrize(
    ("hook", "control", "error", "words"),
    [
        (hk.scale("pattern.1", 0.5), "random", BadHook, "control='random' needs vectors"),
        (hk.ban(5), "random", hk.errors.BadEdit, r"ban\(5\) changes numbers without end"),
        (hk.ablate("z.1"), "resample", BadHook, "ablate.z.1. is no patch: say control='random'"),
        (hk.ablate("z.1"), "radom", BadArgument, "control='radom'"),
    ],
)
def test_a_control_that_means_nothing_is_refused(llama_ids, hook, control, error, words):
    with pytest.raises(error, match=words):
        hk.sweep(llama_ids, CLEAN, {"n": [0]}, lambda n: hook, METRIC, control=control)


def test_a_control_is_drawn_ten_times_unless_told_otherwise_from_the_user_s_seed(llama_ids):
    def cut(**settings):
        return hk.ablations(
            llama_ids, CLEAN, "mlp_out", METRIC, layers=[1], control="random", **settings
        )

    table = cut()
    assert sorted(set(table["draw"])) == list(range(10)) and table["control"].sum() == 10 * len(
        CLEAN
    )
    assert table[table["control"]]["logit_diff"].round(6).nunique() == 10 * len(CLEAN)
    pd.testing.assert_frame_equal(cut(), table)
    other = cut(control_seed=1)
    assert other[~other["control"]].equals(table[~table["control"]])
    assert not set(other[other["control"]]["logit_diff"].round(6)) & set(
        table[table["control"]]["logit_diff"].round(6)
    )
    means = hk.stats.mean_over_prompts(table)
    assert means["n"].tolist() == [2, 2] and "draw" not in means.columns
    each = table[table["control"]].groupby("row")["logit_diff_delta"].mean()
    control = means[means["control"]].iloc[0]
    assert control["logit_diff_delta"] == pytest.approx(each.mean())
    assert control["logit_diff_delta_se"] == pytest.approx(each.std() / 2**0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"control": "random", "draws": 0}, "draws=0"),
        ({"draws": 3}, "draws=3.*say control='random'"),
        ({"control_seed": 3}, "control_seed=3.*say control='random'"),
        ({"control": lambda n: hk.ablate("z.1"), "draws": 3}, "draws=3 goes with"),
        ({"control": lambda n: hk.ablate("z.1"), "control_seed": 3}, "control_seed=3 goes with"),
    ],
)
def test_draws_without_a_control_that_is_drawn_are_refused(llama_ids, settings, words):
    with pytest.raises(BadHook, match=words):
        hk.sweep(llama_ids, CLEAN, {"n": [0]}, lambda n: hk.ablate("z.1"), METRIC, **settings)
    with pytest.raises(BadHook, match="'draw'"):
        hk.sweep(
            llama_ids, CLEAN, {"draw": [0]}, lambda draw: hk.ablate("z.1"), METRIC, control="random"
        )


def test_a_resampled_control_has_no_more_draws_than_other_prompts(small):
    clean, corrupted = pair(8, 8, 8)
    settings = {"layers": [1], "pos": [-1], "control": "resample"}
    with pytest.raises(BadHook, match="a prompt has 2 others of its length"):
        hk.patching(small, clean, corrupted, "resid_post", METRIC, **settings, draws=3)
    with pytest.raises(BadHook, match="control_seed=1 goes with control='random'"):
        hk.patching(small, clean, corrupted, "resid_post", METRIC, **settings, control_seed=1)


def test_a_resampled_control_needs_several_prompts(llama_ids):
    with pytest.raises(BadHook, match="the source of resid_post.0 has one prompt only"):
        hk.patching(llama_ids, CLEAN[:1], CORRUPTED[:1], "resid_post", METRIC, control="resample")


# ---- means over prompts


def many(count: int = 5) -> pd.DataFrame:
    """Two cells of some prompts, with numbers that were not computed by any model."""
    draws = np.random.default_rng(1)
    rows = [{"layer": layer, "pos": "end", "row": row} for layer in (0, 1) for row in range(count)]
    frame = pd.DataFrame(rows)
    for name in ("prob", "prob_before", "prob_delta", "prob_effect"):
        frame[name] = draws.normal(size=len(frame))
    return frame


def test_means_have_their_standard_errors_and_intervals():
    table = many()
    found = hk.stats.mean_over_prompts(table, confidence=0.9)
    assert (
        list(found.columns[:6]) == ["layer", "pos", "n", "prob", "prob_se", "prob_low"]
        and len(found) == 2
    )
    for _, row in found.iterrows():
        for name in ("prob", "prob_before", "prob_delta", "prob_effect"):
            numbers = table[table["layer"] == row["layer"]][name].to_numpy()
            assert row["n"] == row[f"{name}_n"] == 5 and row[name] == pytest.approx(numbers.mean())
            assert row[f"{name}_se"] == pytest.approx(scipy.stats.sem(numbers))
            away = (row[name] - row[f"{name}_low"], row[f"{name}_high"] - row[name])
            tails = sum(scipy.stats.t.sf(each / row[f"{name}_se"], 4) for each in away)
            assert tails == pytest.approx(0.1)  # the long tail is on the side of the sample's own
            assert (away[1] > away[0]) == (scipy.stats.skew(numbers) > 0)
    assert set(found["interval"]) == {"t"}
    pd.testing.assert_frame_equal(
        hk.stats.mean_over_prompts(table), hk.stats.mean_over_prompts(table)
    )


def test_one_prompt_has_a_mean_and_no_interval():
    found = hk.stats.mean_over_prompts(many(1))
    assert found["prob"].notna().all() and found["n"].tolist() == [1, 1]
    assert found[["prob_se", "prob_low", "prob_high"]].isna().all(axis=None)


def test_samples_of_noise_are_no_prompts(llama):
    table = traced(llama, pos=[-1], layers=[0, 1])
    found = hk.stats.mean_over_prompts(table)
    assert found["n"].tolist() == [2, 2] and list(found.columns[:3]) == ["layer", "pos", "n"]
    each = table[table["layer"] == 1].groupby("prompt")["logit_diff_delta"].mean().tolist()
    assert found["logit_diff_delta"][1] == pytest.approx(sum(each) / 2)
    assert found["logit_diff_delta_se"][1] == pytest.approx(abs(each[0] - each[1]) / 2)


def test_means_of_a_control_and_by_columns_of_ones_choice(llama_ids):
    table = hk.ablations(llama_ids, CLEAN, "mlp_out", METRIC, control="random")
    found = hk.stats.mean_over_prompts(table)
    assert list(found.columns[:3]) == ["layer", "control", "n"] and len(found) == 6
    by_row = hk.stats.mean_over_prompts(table, by=["row"])
    assert by_row["n"].tolist() == [3 + 30, 3 + 30]
    assert by_row["logit_diff"][0] == pytest.approx(table[table["row"] == 0]["logit_diff"].mean())
    lists = hk.stats.mean_over_prompts(
        table.assign(layer=[[0, 1], [2]] * 33, control=[slice(0, 3), slice(3, 4)] * 33)
    )
    assert lists["layer"].tolist() == [(0, 1), (2,)] and lists["n"].tolist() == [
        1,
        1,
    ]  # rows of one prompt
    for wrong, words in (
        (pd.DataFrame({"a": [1]}), "give what sweep gave"),
        (table, "confidence=2(.0)? is no share"),
    ):
        with pytest.raises(BadHook, match=words):
            hk.stats.mean_over_prompts(wrong, confidence=2 if wrong is table else 0.9)


# ---- what a plan says


@contextmanager
def counting(lm: hk.LM):
    """Hooks by hand that count the tokens that pass through each block, and the forwards, with the most tokens of each."""
    tokens, forwards = [], []

    def norm(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        tokens.append(output.shape[0] * output.shape[1])
        forwards[-1] = max(forwards[-1], tokens[-1])

    def model(module: nn.Module, args: tuple, kwargs: dict) -> None:
        forwards.append(0)

    norm.__module__ = model.__module__ = (
        "transformers"  # else they count as the user's own, and no cells share
    )
    layers = lm.model.model.layers if lm.config.model_type != "gpt2" else lm.model.transformer.h
    norms = [getattr(each, "input_layernorm", None) or each.ln_1 for each in layers]
    handles = [each.register_forward_hook(norm) for each in norms]
    handles.append(lm.model.register_forward_pre_hook(model, with_kwargs=True))
    try:
        yield tokens, forwards
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("memory", [None, 100_000])
@pytest.mark.parametrize("site", ["resid_pre", "z", "embed"])
def test_the_numbers_of_a_plan_are_those_of_the_sweep(small, site, memory):
    clean, corrupted = pair(9, 6, 9, 5)
    source = hk.forward(small, clean, hk.capture(site))
    grid = {"layer": LAYERS, "pos": [-5, -2, -1]}

    def hooks(layer, pos):
        return hk.patch(hk.Site(site, None if site == "embed" else layer), source, pos=pos)

    plan = hk.sweep_plan(small, corrupted, grid, hooks, METRIC, memory=memory)
    with counting(small) as (tokens, forwards):
        table = hk.sweep(small, corrupted, grid, hooks, METRIC, memory=memory)
    assert plan.layer_tokens == sum(tokens) and plan.forwards == len(forwards)
    assert plan.naive_layer_tokens == 9 * (9 + 6 + 9 + 5) * 3
    assert plan.running + plan.filled == 9 * 4 == len(table)
    assert (table["logit_diff_delta"] == 0).sum() >= plan.filled > 0
    said = repr(plan)
    assert (
        f"{plan.filled:,}: filled with the unedited value" in said and said == table.attrs["plan"]
    )
    assert f"{plan.layer_tokens:,} instead of {plan.naive_layer_tokens:,}" in said
    word = "forward" if plan.forwards == 1 else "forwards"
    assert f"{plan.running:,} in {plan.forwards:,} {word}" in said


def test_a_plan_of_cells_that_run_alone_counts_them_whole():
    lm = hk.tiny("mixtral")
    experts = hk.edit(
        hk.module("model.layers.1.mlp.experts"), lambda values: values * 0.5
    )  # [batch * pos, d_model]
    hooks = lambda n: experts if n else hk.scale("mlp_out.1", 0.5)  # noqa: E731
    plan = hk.sweep_plan(lm, CLEAN, {"n": [0, 1]}, hooks, METRIC)
    assert (
        "alone           1 cell: model.layers.1.mlp.experts:output has no axes batch and pos"
        in repr(plan)
    )
    with counting(lm) as (tokens, forwards):
        table = hk.sweep(lm, CLEAN, {"n": [0, 1]}, hooks, METRIC)
    assert plan.layer_tokens == sum(tokens) and plan.forwards == len(forwards) == 3
    assert table["logit_diff"].tolist()[:2] == pytest.approx(
        table["logit_diff"].tolist()[2:], abs=1e-4
    )


def test_what_serves_all_rows_at_once_is_edited_in_the_rows_of_a_cell(llama_ids):
    rotary = {n: hk.scale(hk.module("model.rotary_emb"), n) for n in (1.0, 0.5)}  # [1, pos, d_head]
    table = hk.sweep(llama_ids, pair(7, 7)[0], {"by": [1.0, 0.5]}, lambda by: rotary[by], METRIC)
    for by, row, found in table[["by", "row", "logit_diff"]].itertuples(index=False):
        turn = llama_ids.model.model.rotary_emb.register_forward_hook(
            lambda m, a, out, by=by: (out[0] * by, out[1])
        )
        wanted = plain(llama_ids, pair(7, 7)[0][row])
        turn.remove()
        assert found == pytest.approx(wanted, abs=1e-4)


def test_a_wave_keeps_to_the_memory(llama_ids):
    prompts = pair(40, 40, 40, 40)[0]
    grid, most = {"layer": LAYERS, "pos": range(0, 40, 3)}, {}
    hooks = lambda layer, pos: hk.scale(hk.Site("resid_pre", layer), 0.5, pos=pos)  # noqa: E731
    for memory in (3 * 10**5, 10**7):
        plan = hk.sweep_plan(llama_ids, prompts, grid, hooks, METRIC, memory=memory)
        with counting(llama_ids) as (tokens, forwards):
            hk.sweep(llama_ids, prompts, grid, hooks, METRIC, memory=memory)
        most[memory] = max(forwards)
        assert plan.memory <= memory and plan.layer_tokens == sum(tokens)
    assert most[3 * 10**5] < most[10**7]


def test_a_plan_runs_nothing_but_a_trial(llama_ids):
    hk.sweep_plan(
        llama_ids, CLEAN, {"layer": LAYERS}, lambda layer: hk.ablate(hk.Site("z", layer)), METRIC
    )
    with counting(llama_ids) as (_, forwards):
        hk.sweep_plan(
            llama_ids,
            CLEAN,
            {"layer": LAYERS},
            lambda layer: hk.ablate(hk.Site("z", layer)),
            METRIC,
        )
    assert forwards == []
