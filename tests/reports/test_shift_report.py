"""The ranked-token-shift report: its numbers are those of plain transformers, its sums add up, its page is safe."""

import base64
import hashlib
import json
import math
import shutil
import subprocess
from contextlib import nullcontext
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tokenizer

import hookkit as hk
from hookkit.display import quote_token
from hookkit.errors import BadArgument, BadHook, OutOfRange, Unsupported
from hookkit.figures.reports import mean_changes
from hookkit.reports.control_draws import DESCRIPTIONS, compare
from hookkit.reports.shift import before_after as resuming
from hookkit.reports.shift.before_after import add_deltas
from hookkit.reports.shift.headline import FEW_PROMPTS
from hookkit.reports.shift.inside import most_moved
from hookkit.reports.shift.named_edits import Edit, table_of
from hookkit.reports.shift.shift_tables import ShiftTables

PROMPTS = ["I like oat milk in my", "We love", "The capital of France is"]
HEAD = (1, 2)
NASTY = ["<script>alert(1)</script>", "</script><b>", " שלום", "\n\t"]


def last_logits(model, rows, module=None, hook=None, *, before=False):
    """What plain transformers says after each row by itself, with one hook written by hand."""
    handle = None
    if module is not None:
        handle = (
            module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        )
    try:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    finally:
        if handle is not None:
            handle.remove()


def without_head(_module, args):
    values = args[0].clone()
    values[..., HEAD[1] * 8 : HEAD[1] * 8 + 8] = 0
    return (values, *args[1:])


def ablated(llama):
    rows = [llama.tokenizer.encode(prompt) for prompt in PROMPTS]
    projection = llama.model.model.layers[HEAD[0]].self_attn.o_proj
    return (
        rows,
        last_logits(llama.model, rows),
        last_logits(llama.model, rows, projection, without_head, before=True),
    )


def check(row, before, after):
    """One row of a table against two lists of logits."""
    token = row["token_id"]
    for when, logits in (("before", before), ("after", after)):
        assert row[f"logit_{when}"] == pytest.approx(float(logits[token]), abs=1e-4)
        assert row[f"prob_{when}"] == pytest.approx(float(logits.softmax(-1)[token]), abs=1e-5)
        assert row[f"rank_{when}"] == 1 + int((logits > logits[token]).sum())
    for name in ("logit", "prob", "rank"):
        assert row[f"{name}_delta"] == pytest.approx(
            row[f"{name}_after"] - row[f"{name}_before"], abs=5e-5
        )  # CSV has six digits
    assert row["rank_delta"] == row["rank_after"] - row["rank_before"]


def test_every_number_in_the_files_is_that_of_a_hook_written_by_hand(llama, tmp_path):
    _, before, after = ablated(llama)
    page = hk.shift_report(
        llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=(3, 40), top=5, controls=0
    ).write(tmp_path)
    watched = pd.read_csv(page.parent / "watched.csv")
    assert len(watched) == 3 * 3 and set(watched["row"]) == {0, 1, 2}
    assert (
        watched[watched["watched"] == "what was first"]["token_id"].tolist()
        == before.argmax(-1).tolist()
    )
    shifts = pd.read_csv(page.parent / "shifts.csv")
    for row in [*watched.to_dict("records"), *shifts.to_dict("records")]:
        check(row, before[row["row"]], after[row["row"]])
    for number in range(3):
        mine = shifts[shifts["row"] == number]
        for when, logits in (("before", before[number]), ("after", after[number])):
            top = mine[mine["why"].str.contains(f"top {when}")]
            assert set(top["token_id"]) == set(logits.topk(5).indices.tolist())
        factors = (mine["rank_before"] / mine["rank_after"]).to_numpy()
        ranks = [
            [1 + int((x[n] > x[n][i]).sum()) for i in range(320)]
            for n in [number]
            for x in (before, after)
        ]
        best = max(one / other for one, other in zip(*ranks, strict=True))
        assert factors.max() == pytest.approx(best), "the largest mover is missing"
    distances = pd.read_csv(page.parent / "distances.csv")
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    assert distances["kl"].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3)
    assert distances["entropy_after"].tolist() == pytest.approx(
        (-(q.exp() * q).sum(-1)).tolist(), rel=1e-5
    )


def test_the_change_is_the_sum_of_its_parts_and_a_part_is_what_the_weights_say(llama):
    rows, before, after = ablated(llama)
    made = hk.shift_report(
        llama, PROMPTS, {"out": hk.ablate(hk.Site("z", *HEAD))}, watch=40, heads=True, controls=0
    )
    for number, part in made.tables["why"].groupby("row"):
        real = part[part["kind"] != "residual"]
        for when, logits in (("before", before), ("after", after)):
            assert real[f"logit_{when}"].sum() == pytest.approx(float(logits[number, 40]), abs=1e-4)
        assert real["logit_delta"].sum() == pytest.approx(
            float(after[number, 40] - before[number, 40]), abs=1e-4
        )
        assert real["logit_delta"].abs().max() > 1e-4
        assert part[part["component"] == "z.1.2"]["logit_after"].tolist() == [0.0]
    model, kept = llama.model, {}
    handles = [
        model.model.layers[2].mlp.register_forward_hook(
            lambda _m, _a, out: kept.__setitem__("mlp", out[0, -1])
        ),
        model.model.norm.register_forward_pre_hook(
            lambda _m, args: kept.__setitem__("end", args[0][0, -1])
        ),
    ]
    last_logits(model, rows[:1])
    for handle in handles:
        handle.remove()
    scale = (kept["end"].pow(2).mean() + model.config.rms_norm_eps).rsqrt()
    share = (
        (kept["mlp"] * scale * model.model.norm.weight * model.lm_head.weight[40]).sum().detach()
    )
    why = made.tables["why"]
    mlp = why[(why["row"] == 0) & (why["component"] == "mlp_out.2")]["logit_before"].item()
    assert mlp == pytest.approx(float(share), abs=1e-5)


def test_decades_are_powers_of_ten_between_the_ranks(llama):
    ranks = pd.DataFrame({"rank_before": [100, 1, 7, 3], "rank_after": [10, 1000, 7, 1]})
    for name in ("logit", "logprob", "prob"):
        ranks[f"{name}_before"] = ranks[f"{name}_after"] = 0.0
    assert add_deltas(ranks)["log10_rank_ratio"].tolist() == pytest.approx(
        [1, -3, 0, 0.47712125], abs=1e-8
    )
    assert add_deltas(ranks)["rank_delta"].tolist() == [-90, 999, 0, -2]
    made = hk.shift_report(
        llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=(3, 40), figures=0, controls=0
    )
    watched = made.tables["watched"]
    wanted = [
        math.log(row.rank_before / row.rank_after) / math.log(10) for row in watched.itertuples()
    ]
    assert watched["log10_rank_ratio"].tolist() == pytest.approx(wanted, abs=1e-9)
    assert max(map(abs, wanted)) > 0.01


def test_the_page_shows_of_each_prompt_and_edit_its_own_rows():
    rows = [(0, "a", 1), (0, "b", 2), (1, "a", 3), (1, "b", 4)]
    tables = {"watched": pd.DataFrame(rows, columns=["row", "edit", "number"])}
    found = ShiftTables(None, (), (), [], [], [], 1, False, 1, 1, tables)  # pyright: ignore[reportArgumentType]
    assert found.of("watched", 1, "a")["number"].tolist() == [3]
    assert found.of("watched", 0)["number"].tolist() == [1, 2]
    assert list(found.of("watched", 0)) == ["edit", "number"] and list(
        found.of("watched", 0, "b")
    ) == ["number"]
    assert found.of("layers", 0).empty


def test_the_components_that_moved_most_and_all_the_others_are_the_whole_sum():
    deltas = [0.5, -3.0, 0.25, 2.0, 0.125, -1.0, 0.0625, 0.00001]
    before = [float(number) for number in range(8)]
    why = pd.DataFrame(
        {"component": list("abcdefgh"), "logit_before": before, "logit_delta": deltas}
    )
    why["logit_after"] = why["logit_before"] + why["logit_delta"]
    three = most_moved(why, 3)
    assert three["component"].tolist() == ["d", "f", "b", "the other 5", "sum: the logit"]
    others = [0 + 2 + 4 + 6 + 7, 0.5 + 0.25 + 0.125 + 0.0625 + 0.00001]
    assert three["logit_before"].tolist() == pytest.approx([3, 5, 1, others[0], 28])
    assert three["logit_delta"].tolist() == pytest.approx([2, -1, -3, others[1], sum(deltas)])
    assert three["logit_after"].tolist() == pytest.approx(
        (three["logit_before"] + three["logit_delta"]).tolist()
    )
    many = most_moved(why, 20)
    assert many["component"].tolist()[-2:] == ["the other 1", "sum: the logit"], (
        "a change of nothing is not shown"
    )
    assert many["logit_delta"].tolist()[-2] == pytest.approx(0.00001)
    few = most_moved(why.iloc[:3], 20)
    assert few["component"].tolist() == ["a", "c", "b", "sum: the logit"], (
        "no others, where all are shown"
    )


def test_the_last_layer_of_the_lens_says_what_the_model_says_and_the_edited_block_is_marked(llama):
    _, before, after = ablated(llama)
    layers = hk.shift_report(
        llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=40, details=2, controls=0
    ).tables["layers"]
    assert set(layers["row"]) == {0, 1}
    assert set(layers[layers["edited"]]["layer"]) == {HEAD[0]}
    for row in layers[layers["layer"] == 2].to_dict("records"):
        check(
            row | {"rank_delta": row["rank_after"] - row["rank_before"]},
            before[row["row"]],
            after[row["row"]],
        )
    unmoved = layers[layers["layer"] == 0]
    assert unmoved["logit_delta"].abs().max() == pytest.approx(0, abs=1e-5), (
        "nothing moves before the edit"
    )


def test_each_edit_takes_one_forward_over_all_prompts_and_the_draws_share_one(llama, monkeypatch):
    edits = {"steered": hk.steer("resid_post.0", torch.ones(32)), "forced": hk.force(5)}
    hk.shift_report(llama, PROMPTS, edits, watch=3, figures=0)  # tries once what the model allows
    rows = []
    norm, forward = llama.model.model.norm, llama.model.model.norm.forward

    def count(states):
        if states.shape[1] > 1:  # the lens puts in states behind the blocks, a token wide
            rows.append(len(states))
        return forward(states)

    monkeypatch.setattr(norm, "forward", count)
    hk.shift_report(llama, PROMPTS, edits, watch=3, figures=0, controls=0)
    assert rows == [3, 3, 3], "without an edit, and with each"
    rows.clear()
    hk.shift_report(llama, PROMPTS, edits, watch=3, figures=0)
    assert len(rows) <= 3 + 2 * 2, "of each edit's control a forward without it, and the draws"
    assert max(rows) >= 20


def test_a_steering_control_is_random_vectors_of_equal_length_and_depends_on_the_seed_alone(llama):
    vector = torch.arange(32.0) / 8
    edit = {"steered": hk.steer("resid_post.1", vector)}
    one, two, other = (
        hk.shift_report(llama, PROMPTS, edit, controls=5, watch=40, seed=seed, figures=0)
        for seed in (1, 1, 2)
    )
    watched = one.tables["watched"]
    assert watched.equals(two.tables["watched"]) and not watched.equals(other.tables["watched"])
    assert set(watched["edit"]) == {"steered", "steered (random)"}
    assert set(watched[watched["edit"] == "steered (random)"]["control"]) == {"steered"}
    about = json.loads(one.files["about.json"])
    assert len(about["hooks"]["steered (random)"]) == about["controls"] == 5
    directions = []
    first = about["hooks"]["steered (random)"][0]
    data = base64.b64decode(tensor_of(first)["safetensors"])
    for number, encoded in enumerate(about["hooks"]["steered (random)"]):
        if number:  # the tensor is written once, and the other draws have its sha256
            assert tensor_of(encoded)["sha256"] == hashlib.sha256(data).hexdigest()
        hook = hk.types.Hook.from_json(json.dumps({**first, "seed": encoded["seed"]}))
        plain, moved = (
            hk.forward(llama, PROMPTS, *hooks, hk.capture("resid_post.1"))["resid_post.1"]
            for hooks in ((), (hook,))
        )
        changes = (moved - plain)[0]
        assert changes.norm(dim=-1).tolist() == pytest.approx(
            [float(vector.norm())] * len(changes), rel=1e-4
        )
        assert (changes - changes[0]).abs().max() < 1e-4, "one vector at all positions"
        directions.append(changes[0] / changes[0].norm())
    cosines = torch.stack([*directions, vector / vector.norm()])
    cosines = (cosines @ cosines.T - torch.eye(6)).abs()
    assert cosines.max() < 0.7


def tensor_of(encoded):
    """The tensor of the edit that a written draw turns."""
    return encoded["of"]["$hook"]["vector"]["tensor"]["$tensor"]


def test_every_number_of_a_draw_is_that_of_a_hook_written_by_hand(llama):
    rows = [llama.tokenizer.encode(prompt) for prompt in PROMPTS]
    made = hk.shift_report(llama, PROMPTS, hk.ablate("z.1.2"), controls=3, watch=40, figures=0)
    hooks = json.loads(made.files["about.json"])["hooks"]["ablate(z.1.2) (random)"]
    assert len(hooks) == 3
    before = last_logits(llama.model, rows)
    watched = made.tables["watched"]
    distances = made.tables["distances"]
    for draw, encoded in enumerate(hooks):
        site = hk.types.Hook.from_json(json.dumps(encoded)).sites[0]
        assert (site.name, site.layer, site.head) != ("z", 1, 2) and site.head is not None

        def cut(_module, args, head=site.head):
            values = args[0].clone()
            values[..., head * 8 : head * 8 + 8] = 0
            return (values, *args[1:])

        projection = llama.model.model.layers[site.layer].self_attn.o_proj
        after = last_logits(llama.model, rows, projection, cut, before=True)
        of_draw = watched[(watched["control"] != "") & (watched["draw"] == draw)]
        assert len(of_draw) == 6
        for row in of_draw.to_dict("records"):
            check(row, before[row["row"]], after[row["row"]])
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).tolist()
        mine = distances[(distances["control"] != "") & (distances["draw"] == draw)]
        assert mine["kl"].tolist() == pytest.approx(kl, rel=1e-3, abs=1e-6)
        changed = (before.argmax(-1) != after.argmax(-1)).tolist()
        assert mine["top1_changed"].tolist() == changed
        entropies = (-(q.exp() * q).sum(-1)).tolist()
        assert mine["entropy_after"].tolist() == pytest.approx(entropies, rel=1e-4)


def test_the_control_of_a_logit_edit_edits_tokens_of_similar_rank_and_none_that_is_watched(llama):
    rows = [llama.tokenizer.encode(prompt) for prompt in PROMPTS]
    before = last_logits(llama.model, rows)
    ranks = torch.stack([1 + (row > row[:, None]).sum(-1) for row in before]).double()
    heights = ranks.log().mean(0)
    edit = {"pushed": hk.boost(by={7: 2.0, 9: -1.0})}
    made = hk.shift_report(llama, PROMPTS, edit, watch=(40, 41), figures=0)
    hooks = json.loads(made.files["about.json"])["hooks"]["pushed (random)"]
    assert len(hooks) == 20
    for encoded in hooks:
        hook = hk.types.Hook.from_json(json.dumps(encoded))
        assert hook.by == (2.0, -1.0) and len(set(hook.tokens)) == 2
        assert {7, 9, 40, 41}.isdisjoint(hook.tokens)
        for token, original in zip(hook.tokens, (7, 9), strict=True):
            closer = (heights - heights[original]).abs() < (
                heights[token] - heights[original]
            ).abs()
            assert int(closer.sum()) < 60
    phrase = {"said": hk.ban(hk.word([7, 9, 11]))}
    made = hk.shift_report(llama, PROMPTS, phrase, controls=2, figures=0)
    hooks = json.loads(made.files["about.json"])["hooks"]["said (random)"]
    assert len(hk.types.Hook.from_json(json.dumps(hooks[0])).tokens[0].text) == 3


KINDS = {
    "head": (hk.ablate("z.1.2"), "parts"),
    "patched": (hk.patch("attn_out.1", "We love tea", pos=-1), "parts"),
    "scaled": (hk.scale("mlp_out.0", 2.0), "parts"),
    "skipped": (hk.skip_block(1), "parts"),
    "knockout": (hk.knockout(1, key=0, query=-1), "parts"),
    "units": (hk.ablate("mlp_post.1", units=[1, 5]), "units"),
    "steered": (hk.steer("resid_post.1", torch.ones(32)), "turned"),
    "stream": (hk.scale("resid_post.1", 0.5), "turned"),
    "function": (hk.edit("mlp_out.1", torch.neg), "turned"),
    "all parts": (hk.scale("mlp_out", 2.0), "turned"),
    "logits": (hk.ban(7), "tokens"),
    "both": ([hk.ban(7), hk.ablate("z.1.2")], "tokens parts"),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_edit_has_its_kind_of_control(llama, name):
    hooks, kinds = KINDS[name]
    made = hk.shift_report(llama, PROMPTS, {"edit": hooks}, figures=0, watch=40)
    edits = made.tables["edits"]
    words = "; ".join(DESCRIPTIONS[kind] for kind in kinds.split())
    assert edits["does"].iloc[1] == words
    assert 2 <= edits["draws"].iloc[1] <= 20
    assert words in made.html()


def test_an_edit_without_a_random_control_says_so_and_a_number_that_was_asked_for_raises(llama):
    everywhere = hk.knockout(range(3), key=0, query=-1)
    made = hk.shift_report(llama, PROMPTS, {"blind": everywhere}, figures=0)
    assert "There is no control: " in made.html() and "name one" in made.html()
    with pytest.raises(Unsupported, match=r"controls=\{'name': hook\}"):
        hk.shift_report(llama, PROMPTS, {"blind": everywhere}, figures=0, controls=5)
    off = hk.shift_report(llama, PROMPTS, {"blind": everywhere}, figures=0, controls=0)
    assert "control" not in json.loads(off.files["about.json"])["answer"]
    assert "against_control" not in off.tables


def test_an_edit_beside_its_control_has_the_means_of_its_draws_and_an_interval_of_the_gain(llama):
    edit = {"steered": hk.steer("resid_post.1", torch.arange(32.0) / 8)}
    prompts = [[5, 6, 7, number + 8] for number in range(12)]
    made = hk.shift_report(llama, prompts, edit, controls=4, watch=40, figures=1)
    watched, table = made.tables["watched"], made.tables["against_control"]
    name = quote_token(llama.string(40))
    row = table[(table["watched"] == name) & (table["measure"] == "logprob_delta")].iloc[0]
    mine = watched[watched["watched"] == name]
    draws = mine[mine["control"] == "steered"].groupby("draw")["logprob_delta"].mean()
    effect = mine[mine["control"] == ""]["logprob_delta"].mean()
    assert len(draws) == row["draws"] == 4 and row["n"] == 12
    assert row["effect"] == pytest.approx(effect) and row["control"] == pytest.approx(draws.mean())
    assert (row["control_min"], row["control_max"]) == pytest.approx((draws.min(), draws.max()))
    # one more draw: a t interval with 3 degrees of freedom
    half = 3.182446305 * draws.std() * (1 + 1 / 4) ** 0.5
    assert row["control_high"] - row["control"] == pytest.approx(half, rel=1e-6)
    assert row["gain"] == pytest.approx(effect - draws.mean())
    assert row["gain_low"] <= row["gain"] - half * 0.999
    assert row["as_large"] == (draws * np.sign(effect) >= abs(effect)).sum()
    answer = json.loads(made.files["about.json"])["answer"]
    assert "over 12 prompts" in answer and "95 % interval" in answer
    few = hk.shift_report(llama, prompts[:3], edit, controls=4, watch=40, figures=0)
    answer = json.loads(few.files["about.json"])["answer"]
    assert "a single draw by" in answer and "interval" not in answer
    assert FEW_PROMPTS in few.html()


def effects_of_vectors(model, prompts, vectors):
    """The changes of token 40's log-probability, and KL, by a hook written by hand: [vector, row]."""
    layer, changes, divergences = model.model.layers[1], [], []
    with torch.no_grad():
        before = model(prompts).logits[:, -1].double().log_softmax(-1)
        for chunk in vectors.split(60):
            added = chunk.repeat_interleave(len(prompts), dim=0)[:, None]
            handle = layer.register_forward_hook(
                lambda _m, _a, out, added=added: (
                    (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added
                )
            )
            logits = model(prompts.repeat(len(chunk), 1)).logits[:, -1]
            handle.remove()
            after = logits.double().log_softmax(-1).view(len(chunk), *before.shape)
            changes.append((after - before)[..., 40])
            divergences.append((before.exp() * (before - after)).sum(-1))
    return torch.cat(changes).numpy(), torch.cat(divergences).numpy()


@pytest.mark.parametrize("n_prompts", [10, 50])
def test_one_more_random_direction_differs_from_the_control_in_3_to_8_of_100_cases(
    llama, n_prompts
):
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(4, 320, (n_prompts, 5), generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(200 * 21, 32, generator=generator))
    measures = effects_of_vectors(llama.model, prompts, 1.7 * directions)
    for effects, least in zip(measures, (-np.inf, 0.0), strict=True):
        alarms = 0
        for case in effects.reshape(200, 21, n_prompts):
            row = compare(case[0], case[1:].T, (least, np.inf))
            alarms += row["gain_low"] > 0 or row["gain_high"] < 0
        assert 0.03 <= alarms / 200 <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("n_prompts", [10, 50])
def test_a_report_on_200_random_vectors_finds_3_to_8_of_100_to_differ(llama, n_prompts):
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(4, 320, (n_prompts, 5), generator=generator).tolist()
    alarms = 0
    for start in range(0, 200, 50):
        edits = {}
        for number in range(50):
            vector = 0.3 * torch.randn(32, generator=generator)
            edits[f"null {number}"] = hk.steer("resid_post.1", vector)
        settings = {"watch": 40, "figures": 0, "details": 1, "seed": start}
        table = hk.shift_report(llama, prompts, edits, **settings).tables["against_control"]
        shown = table[table["watched"] == quote_token(llama.string(40))]
        shown = shown[shown["measure"] == "logprob_delta"]
        assert len(shown) == 50
        alarms += int(((shown["gain_low"] > 0) | (shown["gain_high"] < 0)).sum())
    assert 0.03 <= alarms / 200 <= 0.08


def test_below_ten_prompts_the_figure_of_means_has_the_prompts_in_place_of_intervals(llama):
    edit = {"steered": hk.steer("resid_post.1", torch.arange(32.0) / 8)}
    for count, points in ((3, 3), (12, 0)):
        tables = hk.shift_report(
            llama, (PROMPTS * 4)[:count], edit, watch=40, figures=0, details=1, controls=0
        ).tables
        axes = mean_changes(tables["summary"], tables["watched"]).axes[0]
        dots = [line for line in axes.get_lines() if line.get_marker() == "."]
        assert sum(len(line.get_xdata()) for line in dots) == points
        assert ("interval" in axes.get_xlabel()) == (count == 12)


def test_a_summary_has_the_means_over_prompts_with_intervals_edits_beside_controls(llama):
    edits = {"steered": hk.steer("resid_post.1", torch.ones(32)), "banned": hk.ban(7)}
    controls = {"another": hk.ban(9)}
    made = hk.shift_report(llama, PROMPTS, edits, controls=controls, watch=40, figures=1)
    summary, watched = made.tables["summary"], made.tables["watched"]
    mine = summary[
        (summary["edit"] == "steered") & (summary["watched"] == repr(llama.string(40)))
    ].iloc[0]
    all_rows = watched[
        (watched["edit"] == "steered")
        & (watched["token_id"] == 40)
        & (watched["watched"] != "what was first")
    ]
    assert mine["n"] == 3 and mine["logit_delta"] == pytest.approx(all_rows["logit_delta"].mean())
    assert mine["logit_delta_low"] <= mine["logit_delta"] <= mine["logit_delta_high"]
    banned = summary[
        (summary["edit"] == "banned") & (summary["watched"] == repr(llama.string(7)))
    ].iloc[0]
    assert banned["logit_delta"] == -float("inf") and pd.isna(banned["logit_delta_low"])
    assert summary[summary["edit"] == "another"]["control"].unique().tolist() == ["all"]
    assert made.tables["summary_distances"]["edit"].tolist() == ["steered", "banned", "another"]


def test_base_hooks_act_in_both_runs_of_a_comparison(llama):
    rows = [llama.tokenizer.encode(prompt) for prompt in PROMPTS]
    block = llama.model.model.layers[0]
    projection = llama.model.model.layers[HEAD[0]].self_attn.o_proj

    def steered(_module, _args, output):
        return (output[0] if isinstance(output, tuple) else output) + 1

    before = last_logits(llama.model, rows, block, steered)
    handle = block.register_forward_hook(steered)
    after = last_logits(llama.model, rows, projection, without_head, before=True)
    handle.remove()
    edit, base = hk.ablate(hk.Site("z", *HEAD)), hk.steer("resid_post.0", torch.ones(32))
    made = hk.shift_report(llama, PROMPTS, edit, base_hooks=base, watch=40, figures=0, controls=2)
    watched = made.tables["watched"]
    for row in watched[watched["control"] == ""].to_dict("records"):
        check(row, before[row["row"]], after[row["row"]])
    encoded = json.loads(made.files["about.json"])["hooks"][f"{edit} (random)"][0]
    draw = hk.types.Hook.from_json(json.dumps(encoded))
    run = hk.forward(llama, PROMPTS, base, draw)
    logits = torch.stack([run.logits[row, len(ids) - 1] for row, ids in enumerate(rows)])
    p, q = before.double().log_softmax(-1), logits.double().log_softmax(-1)
    drawn = made.tables["distances"].query("control != '' and draw == 0")["kl"].tolist()
    assert drawn == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3)


def test_the_texts_part_where_their_tokens_first_differ(llama):
    plain = hk.generate(llama, PROMPTS[1], max_new_tokens=6, do_sample=False)
    written = plain.tokens[0, plain.prompt_lengths[0] :].tolist()
    at = max(written.index(token) for token in written)
    assert at > 0, "a text that says one token only has nothing to part from"
    made = hk.shift_report(
        llama, PROMPTS, {"other": hk.ban(written[at])}, generate=6, figures=0, controls=0
    )
    texts = made.tables["texts"]
    row = texts[texts["row"] == 1].iloc[0]
    assert row["before"] == plain.generated[0] and row["first_difference"] == at
    assert row["both"] == llama.text(written[:at]) and row["then_before"] == llama.text(
        written[at:]
    )
    assert not row["then_after"].startswith(llama.string(written[at]))


@pytest.fixture(scope="module")
def nasty():
    words = tokenizer()
    words.add_tokens(NASTY)
    return hk.tiny("llama", tokenizer=words, config={"vocab_size": len(words)})


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.cells, self.scripts, self.handlers, self.inside = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        if self.inside == "td":
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.inside = ""


def test_hostile_tokens_are_shown_as_they_are_and_never_run(nasty, tmp_path):
    watch = [nasty.token(word) for word in NASTY]
    half = next(i for i in range(320) if nasty.tokenizer.decode([i]) == "\ufffd")
    edits = {NASTY[0]: [hk.boost(*watch, by=9), hk.boost(half, by=8)]}
    made = hk.shift_report(
        nasty,
        PROMPTS,
        edits,
        watch=watch,
        title=NASTY[0],
        question=NASTY[1],
        generate=2,
        controls=0,
    )
    folder = made.write(tmp_path).parent
    parsed = Page()
    parsed.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert "".join(parsed.scripts) == files("hookkit.reports").joinpath(
        "templates", "report.js"
    ).read_text(encoding="utf-8")
    assert parsed.tags.count("script") == 1 and not parsed.handlers and "b" not in parsed.tags
    for word in NASTY:
        assert repr(word) in parsed.cells
    assert nasty.string(half).startswith("<0x") and repr(nasty.string(half)) in parsed.cells
    assert "default-src &#39;none&#39;" in (folder / "report.html").read_text()
    for name in ("watched", "shifts"):
        told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert set(NASTY) <= {row["token"] for row in told}
        assert len(told) == len(pd.read_csv(folder / f"{name}.csv"))
        assert (folder / f"{name}.tex").read_text().isascii()
        assert "`'<script>alert(1)</script>'`" in (folder / f"{name}.md").read_text(
            encoding="utf-8"
        )


def test_where_a_model_allows_no_sum_or_lens_the_page_says_why(llama):
    page = hk.shift_report(llama, PROMPTS[:1], hk.ban(7), figures=0, controls=0)
    assert "why" not in page.tables and "there is no sum" in page.html()
    alone = hk.LM(torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)))
    made = hk.shift_report(alone, [[1, 2, 3]], hk.scale(hk.module("0"), 2.0), watch=3, controls=0)
    page = made.html()
    assert (
        {"why", "layers"}.isdisjoint(made.tables)
        and "There is no lens" in page
        and "there is no sum" in page
    )
    embed, head = alone.root
    weights = (embed.weight[3] @ head.weight[3] * 2 + head.bias[3]).detach()
    assert made.tables["watched"]["logit_after"].iloc[0] == pytest.approx(float(weights), abs=1e-5)


def test_the_same_report_twice_is_the_same_bytes_and_says_how_it_was_made(llama, tmp_path):
    edit = {"steered": hk.steer("resid_post.1", torch.ones(32))}
    for name in ("one", "two"):
        hk.shift_report(llama, PROMPTS, edit, controls=3, watch=40).write(tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    about = json.loads(one["about.json"])
    assert about["prompts"] == PROMPTS and about["seed"] == 0 and about["versions"]["torch"]
    assert hk.types.Hook.from_json(json.dumps(about["hooks"]["steered"][0])) == edit["steered"]


@pytest.mark.parametrize(
    ("edits", "settings", "error", "words"),
    [
        ((), {}, BadHook, "has no hook"),
        (({},), {}, BadHook, "there is no edit"),
        (({"a": []},), {}, BadHook, "the edit 'a' has no hook"),
        ((hk.capture("embed"),), {}, BadHook, "which changes nothing"),
        (({"a": hk.ban(3)}, hk.ban(4)), {}, BadHook, "put all edits into one mapping"),
        (
            (hk.ban(3),),
            {"controls": "zufall"},
            BadArgument,
            "controls='zufall': give a whole number",
        ),
        (
            (hk.ban(3),),
            {"controls": "random"},
            BadArgument,
            "controls='random': give a whole number",
        ),
        ((hk.ban(3),), {"controls": True}, BadArgument, "controls=True: give a whole number"),
        ((hk.ban(3),), {"controls": -1}, OutOfRange, "controls=-1"),
        (({"a": hk.ban(3)},), {"controls": {"a": hk.ban(4)}}, BadHook, "the name of another"),
        ((hk.ban(3),), {"top": 0}, OutOfRange, "top=0: give a whole number, at least 1"),
        ((hk.ban(3),), {"details": True}, BadArgument, "details=True"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_is_refused_before_anything_runs(
    llama, edits, settings, error, words
):
    with pytest.raises(error, match=words):
        hk.shift_report(llama, PROMPTS, *edits, **settings)


def test_in_a_browser_the_headings_sort_and_nothing_else_runs(nasty, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium")
    page = hk.shift_report(
        nasty, PROMPTS[:1], hk.force(nasty.token(NASTY[0])), figures=0, controls=0
    ).write(tmp_path)
    text = page.read_text()
    page.write_text(text.replace("</main>", "<script>document.title = 'run'</script></main>"))
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    shown = subprocess.run(
        [browser, *words, page.as_uri()], capture_output=True, text=True, timeout=60
    ).stdout
    assert '<button type="button">token</button>' in shown, "the page's own script did not run"
    assert "<title>run</title>" not in shown


def test_the_page_says_at_which_position_an_edit_acts(llama):
    vector = torch.ones(32)
    edits = {str(pos): hk.steer("resid_post.1", vector, pos=pos) for pos in (-1, 2)}
    edits["all"] = hk.steer("resid_post.1", vector)
    text = hk.shift_report(llama, PROMPTS, edits, watch=" milk", figures=0, controls=0).html()
    assert "resid_post.1, at the last position" in text
    assert "resid_post.1, at position 2" in text
    assert "at every position" not in text


def test_the_columns_of_why_a_token_moved_begin_with_what_a_row_is_about(llama):
    report = hk.shift_report(
        llama, PROMPTS, {"head off": hk.ablate("z.1.2")}, watch=" milk", figures=0, controls=0
    )
    columns = ["row", "edit", "token", "token_id", "component", "kind", "layer", "head"]
    columns += ["logit_before", "logit_after", "logit_delta"]
    assert report.tables["why"].columns.tolist() == columns


def test_of_the_tokens_in_the_figure_those_that_lead_are_named_before_those_that_are_second():
    from hookkit.figures.reports import NAMED, rank_against_rank

    movers = [
        {
            "token": f" m{n}",
            "rank_before": 10 + n,
            "rank_after": 1000 + n,
            "log10_rank_ratio": -2.0 + n / 100,
            "rank_delta": 990,
            "why": "moved",
        }
        for n in range(NAMED - 1)
    ]
    leads = {
        "token": " first",
        "rank_before": 1,
        "rank_after": 1,
        "log10_rank_ratio": 0.0,
        "rank_delta": 0,
        "why": "first",
    }
    second = leads | {"token": " second", "rank_before": 2, "rank_after": 2}
    table = pd.DataFrame([*movers, second, leads])
    ranks = np.arange(1, 2001)
    (axes,) = rank_against_rank({"edit": (table, ranks, ranks)}).axes
    names = " ".join(text.get_text() for text in axes.texts)
    assert "first" in names and "second" not in names
    assert all(f" m{n}" in names.replace("·", " ") or f"m{n}" in names for n in range(NAMED - 1))


# ---- forwards that begin where an edit does


RESUMED = ["llama", "gpt2", "gemma2", "gpt_neox", "qwen3_moe", "mamba", "lfm2"]


@pytest.mark.parametrize("family", RESUMED)
def test_forwards_that_begin_at_the_edited_block_say_what_whole_ones_do(family, monkeypatch):
    lm = hk.tiny(family, tokenizer=tokenizer())
    vector = torch.randn(
        lm.shape(hk.Site("resid_post", 1)), generator=torch.Generator().manual_seed(0)
    )
    edits = {
        "logits": hk.boost(" milk", by=3),
        "last": hk.steer("resid_post.2", vector),
        "inner": hk.steer("resid_pre.2", vector, pos=-1),
        "first": hk.scale("resid_pre.0", 2),
        "block": hk.skip_block(1),
        "embedding": hk.scale("embed", 2),
        "both": [hk.scale("resid_post.1", 0.5), hk.boost(" m", by=-2)],
    }
    made = {}
    for worth in (0, 10**9):
        monkeypatch.setattr("hookkit.reports.shift.before_after.MIN_TOKENS", worth)
        made[worth] = hk.shift_report(
            lm, PROMPTS, edits, watch=" milk", controls=2, figures=0, details=2
        ).tables
    assert made[0].keys() == made[10**9].keys()
    for name, table in made[0].items():
        pd.testing.assert_frame_equal(table, made[10**9][name], rtol=1e-4, atol=1e-5)


def test_the_blocks_below_an_edit_do_not_run_again(llama, monkeypatch):
    rows = [tuple(llama.encode(prompt)) for prompt in PROMPTS]
    edits = [
        (hk.boost(" milk", by=3),),
        (hk.ablate("z.2.1"),),
        (hk.skip_block(1),),
        (hk.scale("resid_pre.0", 2),),
    ]
    monkeypatch.setattr(resuming, "MIN_TOKENS", 0)
    later = resuming.plan_resuming(llama, rows, edits)
    assert later.starts == {0: 3, 1: 2, 2: 1}
    ran = []
    for number, layer in enumerate(llama.model.model.layers):
        monkeypatch.setattr(
            layer.mlp,
            "forward",
            lambda *a, n=number, f=layer.mlp.forward: (ran.append(n), f(*a))[1],
        )
    with later.record_outputs():
        hk.forward(llama, [*map(list, rows)], logits="last")
    for place, expected in ((0, []), (1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
        ran.clear()
        with later.resume_at(later.starts.get(place, 0)):
            hk.forward(llama, [*map(list, rows)], logits="last")
        assert ran == expected


@pytest.mark.parametrize("why", ["training", "the user's hook", "a block around it", "few tokens"])
def test_a_model_that_may_not_be_resumed_runs_whole_forwards(why, monkeypatch):
    lm = hk.LM(hk.tiny("llama").model)
    monkeypatch.setattr(resuming, "MIN_TOKENS", 10**9 if why == "few tokens" else 0)
    lm.root.train(why == "training")
    if why == "the user's hook":
        lm.model.model.layers[0].register_forward_hook(lambda *_: None)
    around = [hk.capture("resid_post.0")] if why == "a block around it" else []
    with hk.attach(lm, *around) if around else nullcontext():
        assert not resuming.plan_resuming(lm, [(5, 6, 7)], [(hk.ablate("z.2.1"),)]).starts
        hk.forward(lm, [[5, 6, 7]])


def answer_of(lm, prompts, hook, **settings):
    page = hk.shift_report(lm, prompts, {"edit": hook}, figures=0, **settings)
    return json.loads(page.files["about.json"])["answer"]


def test_the_first_sentence_about_one_prompt_says_whether_a_token_moved_and_which_is_first(llama):
    leading = hk.ranks(hk.forward(llama, PROMPTS[0]), top=50)
    ascii_ids = [token for token in leading["token_id"] if llama.string(token).isascii()]
    first, second = ascii_ids[:2]
    one, two = quote_token(llama.string(first)), quote_token(llama.string(second))
    rank = leading.set_index("token_id")["rank"][second]
    nothing, forced = hk.scale("resid_post.0", 1.0), hk.force(second)
    still = answer_of(llama, PROMPTS[0], nothing, watch=first, controls=0)
    assert f"the token {one} stays at rank 1; its probability was" in still
    assert "most likely token" not in still
    still = answer_of(llama, PROMPTS[0], nothing, watch=second, controls=0)
    assert still.endswith(f"The most likely token is still {one}.")
    risen = answer_of(llama, PROMPTS[0], forced, watch=second)
    assert f"the token {two} rises from rank {rank} (" in risen
    assert f"The most likely token is now {two}; before the edit it was {one}." in risen
    assert "None of the 20 draws raises it as much as the edit does." in risen


def test_the_first_sentences_are_about_all_prompts_and_stand_beside_the_control(llama):
    prompts = [[5, 6, 7, number + 8] for number in range(12)]
    forced = answer_of(llama, prompts, hk.force(40))
    assert "over 12 prompts" in forced and "rises in 12 and falls in 0" in forced
    assert "most likely token after 12 of 12 prompts with the edit, and after 0 without" in forced
    assert "So the edit differs from its control: the difference is +" in forced
    banned = answer_of(llama, prompts, hk.ban(40))
    assert "Its probability is 0 after 12 of 12 prompts with the edit." in banned
    random = 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    null = answer_of(llama, prompts, hk.steer("resid_post.1", random), watch=40)
    assert "is not distinguished from its control" in null


def test_an_edit_is_not_named_as_the_run_without_it(llama):
    with pytest.raises(BadHook, match="an edit is named 'base_hooks'"):
        hk.shift_report(llama, [[5, 6, 7]], {"base_hooks": hk.ablate("z.1")})


@pytest.mark.parametrize(
    ("pos", "words"),
    [
        (hk.IMAGE, "at the tokens of images"),
        (hk.PROMPT, "at every token of the prompt"),
        (hk.at("oat"), "at the tokens of at('oat')"),
        (-1, "at the last position"),
    ],
)
def test_an_edit_is_told_in_words(pos, words):
    edits = [Edit("it", (hk.ablate("resid_post.1", pos=pos),))]
    assert table_of(edits)["does"].iloc[0].endswith(words)
