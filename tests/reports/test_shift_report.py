"""The ranked-token-shift report: its numbers are those of plain transformers, its sums add up, its page is safe."""

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
from hookkit.errors import BadArgument, BadHook, OutOfRange
from hookkit.figures.reports import mean_changes
from hookkit.reports.shift import before_after as resuming
from hookkit.reports.shift.before_after import add_deltas
from hookkit.reports.shift.inside import most_moved
from hookkit.reports.shift.shift_page import ShiftTables

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
        llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=(3, 40), top=5
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
        llama, PROMPTS, {"out": hk.ablate(hk.Site("z", *HEAD))}, watch=40, heads=True
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
    made = hk.shift_report(llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=(3, 40), figures=0)
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
        llama, PROMPTS, hk.ablate(hk.Site("z", *HEAD)), watch=40, details=2
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


def test_each_edit_and_control_takes_one_forward_over_all_prompts(llama):
    shapes = []
    handle = llama.model.register_forward_pre_hook(
        lambda _m, _a, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    edits = {"steered": hk.steer("resid_post.0", torch.ones(32)), "forced": hk.force(5)}
    hk.shift_report(llama, PROMPTS * 2, edits, controls="random", watch=3)
    handle.remove()
    whole = [
        shape for shape in shapes if shape[1] > 1
    ]  # the lens puts states behind the blocks, a token wide
    assert [shape[0] for shape in whole] == [6] * (1 + 2 + 2 * 5), "a control is drawn five times"


def test_a_random_control_changes_as_much_and_depends_on_the_seed_alone(llama):
    vector = torch.arange(32.0) / 8
    edit = {"steered": hk.steer("resid_post.1", vector, pos=-1)}
    one, two, other = (
        hk.shift_report(llama, PROMPTS, edit, controls="random", watch=40, seed=seed, figures=0)
        for seed in (1, 1, 2)
    )
    watched = one.tables["watched"]
    assert watched.equals(two.tables["watched"]) and not watched.equals(other.tables["watched"])
    assert set(watched["edit"]) == {"steered", "steered (random)"}
    assert set(watched[watched["edit"] == "steered (random)"]["control"]) == {"steered"}
    about = json.loads(one.files["about.json"])
    assert len(about["hooks"]["steered (random)"]) == about["draws"] == 5
    hook = hk.types.Hook.from_json(json.dumps(about["hooks"]["steered (random)"][0]))
    plain, moved = (
        hk.forward(llama, PROMPTS, *hooks, hk.capture("resid_post.1", pos=-1))["resid_post.1"]
        for hooks in ((), (hook,))
    )
    assert (moved - plain).norm(dim=-1).flatten().tolist() == pytest.approx(
        [float(vector.norm())] * 3, rel=1e-4
    )
    assert torch.cosine_similarity((moved - plain)[0, 0], vector, dim=0).abs() < 0.9


def test_a_random_control_is_the_mean_of_its_draws_over_the_prompts(llama):
    edit = {"steered": hk.steer("resid_post.1", torch.arange(32.0) / 8)}
    made = hk.shift_report(llama, PROMPTS, edit, controls="random", draws=4, watch=40, figures=1)
    watched, summary = made.tables["watched"], made.tables["summary"]
    mine = watched[
        (watched["control"] == "steered") & (watched["watched"] == repr(llama.string(40)))
    ]
    assert sorted(mine["draw"]) == sorted([0, 1, 2, 3] * 3) and mine["logit_delta"].nunique() == 12
    each = mine.groupby("row")["logit_delta"].mean()
    cell = summary[
        (summary["control"] == "steered") & (summary["watched"] == repr(llama.string(40)))
    ].iloc[0]
    assert cell["n"] == 3 and cell["logit_delta"] == pytest.approx(each.mean())
    assert cell["logit_delta_se"] == pytest.approx(each.std() / 3**0.5)
    assert made.tables["edits"][["edit", "draws"]].values.tolist() == [
        ["steered", 1],
        ["steered (random)", 4],
    ]
    with pytest.raises(BadHook, match="draws=4 goes with controls='random'"):
        hk.shift_report(llama, PROMPTS, edit, draws=4)
    with pytest.raises(OutOfRange, match="draws=0"):
        hk.shift_report(llama, PROMPTS, edit, controls="random", draws=0)


def test_below_ten_prompts_the_figure_of_means_has_the_prompts_in_place_of_intervals(llama):
    edit = {"steered": hk.steer("resid_post.1", torch.arange(32.0) / 8)}
    for count, points in ((3, 3), (12, 0)):
        tables = hk.shift_report(
            llama, (PROMPTS * 4)[:count], edit, watch=40, figures=0, details=1
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
    made = hk.shift_report(
        llama, PROMPTS, edit, base_hooks=base, watch=40, figures=0, controls="random", draws=1
    )
    watched = made.tables["watched"]
    for row in watched[watched["control"] == ""].to_dict("records"):
        check(row, before[row["row"]], after[row["row"]])
    kl = made.tables["distances"].groupby("control")["kl"].mean()
    assert kl.max() < 2 * kl[""], "the control has the base hooks too"


def test_the_texts_part_where_their_tokens_first_differ(llama):
    plain = hk.generate(llama, PROMPTS[1], max_new_tokens=6, do_sample=False)
    written = plain.tokens[0, plain.prompt_lengths[0] :].tolist()
    at = max(written.index(token) for token in written)
    assert at > 0, "a text that says one token only has nothing to part from"
    made = hk.shift_report(llama, PROMPTS, {"other": hk.ban(written[at])}, generate=6, figures=0)
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
        nasty, PROMPTS, edits, watch=watch, title=NASTY[0], question=NASTY[1], generate=2
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
    page = hk.shift_report(llama, PROMPTS[:1], hk.ban(7), figures=0)
    assert "why" not in page.tables and "there is no sum" in page.html()
    alone = hk.LM(torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)))
    made = hk.shift_report(alone, [[1, 2, 3]], hk.scale(hk.module("0"), 2.0), watch=3)
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
        hk.shift_report(llama, PROMPTS, edit, controls="random", watch=40).write(tmp_path / name)
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
        ((hk.ban(3),), {"controls": "zufall"}, BadHook, "controls='zufall' is unknown"),
        ((hk.knockout(1, key=0, query=-1),), {"controls": "random"}, BadHook, "needs vectors"),
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
    page = hk.shift_report(nasty, PROMPTS[:1], hk.force(nasty.token(NASTY[0])), figures=0).write(
        tmp_path
    )
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
    text = hk.shift_report(llama, PROMPTS, edits, watch=" milk", figures=0).html()
    assert "resid_post.1, at the last position" in text
    assert "resid_post.1, at position 2" in text
    assert "at every position" not in text


def test_the_columns_of_why_a_token_moved_begin_with_what_a_row_is_about(llama):
    report = hk.shift_report(
        llama, PROMPTS, {"head off": hk.ablate("z.1.2")}, watch=" milk", figures=0
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
            lm, PROMPTS, edits, watch=" milk", controls="random", figures=0, details=2
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


def test_the_first_sentence_says_whether_a_token_moved_and_whether_another_is_first(llama):
    leading = hk.ranks(hk.forward(llama, PROMPTS[0]), top=50)
    readable = leading[leading["token"].str.isascii()]
    (first, one, top), (second, two, rank) = (
        readable[["token_id", "token", "rank"]].head(2).itertuples(index=False)
    )
    assert top == 1
    nothing, forced = hk.scale("resid_post.0", 1.0), hk.force(second)

    def said(hook, token):
        return json.loads(
            hk.shift_report(llama, PROMPTS[0], {"edit": hook}, watch=token).files["about.json"]
        )["answer"]

    assert f"the token {one!r} stays at rank 1 (probability " in said(nothing, first)
    assert "first is" not in said(nothing, first)
    assert said(nothing, second).endswith(f"first is still {one!r}.")
    assert f"the token {two!r} goes from rank {rank} (" in said(forced, second)
    assert said(forced, second).endswith(f"first is {two!r}, and was {one!r}.")


def test_an_edit_is_not_named_as_the_run_without_it(llama):
    with pytest.raises(BadHook, match="an edit is named 'base_hooks'"):
        hk.shift_report(llama, [[5, 6, 7]], {"base_hooks": hk.ablate("z.1")})
