# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
"""Numbers at the edge: too large for a dtype, too near to each other, NaN."""

import math

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, HookkitError
from hookkit.runs import applied_hooks

IDS = [[5, 6, 7]]
ONES = torch.ones(32)
SMALL = (torch.bfloat16, torch.float16)


def lm_in(dtype: torch.dtype, scale: float = 1.0) -> hk.LM:
    """A tiny model in a dtype, its logits larger by a factor."""
    model = hk.tiny("llama").model.to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return hk.LM(model)


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, hk.LM]:
    return {dtype: lm_in(dtype) for dtype in (torch.float32, *SMALL)}


def large_run(size: float) -> hk.types.Run:
    """A float32 run in which one captured number is this large."""
    spike = torch.zeros(32)
    spike[3] = size
    return hk.forward(
        hk.tiny("llama"), IDS, hk.ablate("resid_post.1", to=spike), hk.capture("resid_post.1")
    )


TOO_LARGE = {
    "steer by 1e300": (torch.float32, lambda: hk.steer("resid_post.1", ONES.double() * 1e300)),
    "steer, scale 1e39": (torch.float32, lambda: hk.steer("resid_post.1", ONES, scale=1e39)),
    "steer at a module": (
        torch.float32,
        lambda: hk.steer(hk.module("model.norm"), ONES * 3e38, scale=2.0),
    ),
    "steer by 1e5": (torch.float16, lambda: hk.steer("resid_post.1", ONES * 1e5)),
    "two steps that overflow together": (
        torch.float16,
        lambda: hk.steer("resid_post.1", ONES * 4e4, scale=1.9),
    ),
    "scale by 1e39": (torch.float32, lambda: hk.scale("z.1", 1e39)),
    "scale by 1e7": (torch.float16, lambda: hk.scale("resid_post.1", 1e7)),
    "scale scores by 1e39": (torch.float32, lambda: hk.scale("scores.1", -1e39)),
    "boost by 1e39": (torch.float32, lambda: hk.boost(5, by=1e39)),
    "boost by -1e39": (torch.float32, lambda: hk.boost(5, by=-1e39)),
    "boost two": (torch.float16, lambda: hk.boost(by={5: 1.0, 6: 1e5})),
    "force by 1e300": (torch.float32, lambda: hk.force(5, margin=1e300)),
    "force by 7e4": (torch.float16, lambda: hk.force(5, margin=7e4)),
    "cap at -1e39": (torch.float32, lambda: hk.cap(5, logit=-1e39)),
    "ablate to 1e5": (torch.float16, lambda: hk.ablate("resid_post.1", to=ONES * 1e5)),
    "ablate some units to 1e5": (
        torch.float16,
        lambda: hk.ablate("resid_post.1", to=ONES * 1e5, units=[3]),
    ),
    "patch from float32": (torch.float16, lambda: hk.patch("resid_post.1", large_run(1e5))),
    "mean of a float32 run": (
        torch.float16,
        lambda: hk.ablate("resid_post.1", to="mean", over=large_run(1e5)),
    ),
    "resample of it": (
        torch.float16,
        lambda: hk.ablate("resid_post.1", to="resample", over=large_run(1e5)),
    ),
    "a function that divides by 0": (
        torch.float32,
        lambda: hk.edit("resid_post.1", lambda x: x / 0),
    ),
    "a function that gives -inf": (
        torch.float32,
        lambda: hk.edit("resid_post.1", lambda x: x * 0 - math.inf),
    ),
    "a function that gives inf logits": (
        torch.float32,
        lambda: hk.edit("logits", lambda x: x + math.inf),
    ),
    "a capture in float16": (torch.float32, lambda: hk.capture("resid_post.1", dtype="float16")),
}


@pytest.mark.parametrize("case", TOO_LARGE, ids=TOO_LARGE)
@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_a_number_that_the_dtype_cannot_hold_raises(models, case, verb):
    dtype, make = TOO_LARGE[case]
    hooks = [make()]
    if case == "a capture in float16":
        hooks = [hk.ablate("resid_post.1", to=ONES * 27_000 * 3), *hooks]
    with pytest.raises((BadHook, BadEdit)) as raised:
        if verb == "forward":
            hk.forward(models[dtype], IDS, *hooks)
        else:
            hk.generate(models[dtype], IDS, *hooks, max_new_tokens=2)
    assert any(
        word in str(raised.value) for word in ("cannot hold", "infinite", "no larger number")
    )


def test_numbers_that_just_fit_are_taken(models):
    half, single = models[torch.float16], models[torch.float32]
    run = hk.forward(
        half,
        IDS,
        hk.ablate("resid_post.1", to=ONES * 65_504),
        hk.capture("resid_post.1"),
        logits=False,
    )
    assert (run["resid_post.1"] == 65_504).all()
    wide = hk.forward(
        single,
        IDS,
        hk.ablate("embed", to=ONES * 3e38),
        hk.capture("embed", dtype="float64"),
        logits=False,
    )
    assert (wide["embed"] == torch.tensor(3e38).double()).all()
    small = hk.forward(
        half, IDS, hk.steer("mlp_out.1", ONES * 1e5, scale=0.5), hk.capture("mlp_out.1")
    )
    plain = hk.forward(half, IDS, hk.capture("mlp_out.1"))
    assert torch.equal(small["mlp_out.1"], plain["mlp_out.1"] + 50_000)


def test_masks_are_no_overflow(models):
    lm = models[torch.float32]
    runs = [
        hk.forward(lm, IDS, hk.ban(5), hk.boost(6, by=2.0), hk.swap(5, 7)),
        hk.forward(lm, IDS, hk.restrict(5, 6), hk.edit("logits", lambda x: x * 2)),
        hk.forward(lm, IDS, hk.edit("logits", lambda x: x.masked_fill(x < 0, -math.inf))),
        hk.forward(lm, IDS, hk.force(5, margin=math.inf), hk.force(6)),
        hk.forward(lm, IDS, hk.scale("scores.1", 0.5), hk.knockout(1, key=0, query=-1)),
    ]
    source = hk.forward(lm, IDS, hk.ban(5), hk.capture("logits"))
    runs.append(hk.forward(lm, IDS, hk.patch("logits", source)))
    assert not any(run.logits.isnan().any() for run in runs)
    assert runs[-1].logits[0, -1, 5] == -math.inf


def test_a_model_that_is_infinite_itself_is_not_blamed_on_the_edit():
    lm = lm_in(torch.float32)
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    run = hk.forward(
        lm, IDS, hk.steer("resid_post.1", ONES), hk.scale("resid_post.2", 0.5), hk.boost(5, by=1.0)
    )
    assert not run.logits.isfinite().any()
    with pytest.raises(BadEdit, match="31 numbers at resid_post.1|93 numbers at resid_post.1"):
        hk.forward(lm, IDS, hk.scale("resid_post.1", 1e39))


def test_on_other_devices_the_results_are_looked_at_once_for_a_forward(models, monkeypatch):
    """As on a GPU, where each look would have to wait for the device."""
    monkeypatch.setattr(applied_hooks, "AT_ONCE", frozenset())
    lm = models[torch.float32]
    for hook in (
        hk.scale("z.1", 1e39),
        hk.scale("scores.1", -1e39),
        hk.boost(5, by=3e38),
        hk.edit("embed", lambda x: x / 0),
    ):
        for logits in ("all", "last", False):
            hooks = (
                [hk.boost(5, by=3e38), hook]
                if "boost" in str(hook)
                else [hook, hk.capture("resid_post.2")]
            )
            with pytest.raises(BadEdit, match="infinite or NaN|no larger") as raised:
                hk.forward(lm, IDS, *hooks, logits=logits) if "boost" not in str(
                    hook
                ) else hk.forward(lm, IDS, *hooks)
            assert str(hook.sites[0]) in str(raised.value)
    run = hk.forward(lm, IDS, hk.scale("z.1", 2.0), hk.ban(5), hk.steer("embed", ONES * 1e38))
    assert not run.logits.isnan().any()


def test_on_other_devices_a_sweep_looks_at_the_results_too(models, monkeypatch):
    monkeypatch.setattr(applied_hooks, "AT_ONCE", frozenset())
    with pytest.raises(BadEdit, match="scale.* gives numbers at z.1 that are infinite or NaN"):
        hk.sweep(
            models[torch.float32],
            IDS,
            {"layer": [0, 1]},
            lambda layer: hk.scale(f"z.{layer}", 1e39 if layer else 2.0),
            hk.metrics.prob(5),
        )


@pytest.mark.parametrize(
    "vector",
    [ONES + 1j, ONES > 0, torch.full((32,), math.nan), torch.full((32,), math.inf), 1j],
    ids=str,
)
def test_a_vector_of_other_than_real_numbers_raises(vector):
    for make in (
        lambda: hk.steer("resid_post.1", vector),
        lambda: hk.ablate("resid_post.1", to=vector),
        lambda: hk.project_out("resid_post.1", vector),
    ):
        with pytest.raises(HookkitError):
            make()
    for make in (
        lambda: hk.scale("z.1", 1j),
        lambda: hk.boost(5, by=1j),
        lambda: hk.force(5, margin=True),
    ):
        with pytest.raises(HookkitError):
            make()


def test_a_vector_of_whole_numbers_is_taken_exactly(models):
    lm = models[torch.float32]
    for whole in (
        torch.arange(32),
        torch.arange(32, dtype=torch.uint8),
        torch.full((32,), 2**24 + 1),
    ):
        run = hk.forward(lm, IDS, hk.ablate("resid_post.1", to=whole), hk.capture("resid_post.1"))
        assert torch.equal(run["resid_post.1"][0, 0], whole.double().float())
    assert (
        hk.steer("z.1", torch.full((32,), 2**24 + 1)).vector.tensor.double().tolist()
        == [2**24 + 1.0] * 32
    )


def test_a_direction_of_any_length_is_taken_out(models):
    lm = models[torch.float32]
    plain = hk.forward(lm, IDS, hk.capture("resid_post.1"))["resid_post.1"]
    for size in (1e-30, 1.0, 1e30, 1e300):
        run = hk.forward(
            lm,
            IDS,
            hk.project_out("resid_post.1", ONES.double() * size),
            hk.capture("resid_post.1"),
        )
        right = plain - plain.mean(-1, keepdim=True)
        torch.testing.assert_close(run["resid_post.1"], right, atol=1e-5, rtol=0)


def rank_of(logits: torch.Tensor, token: int) -> int:
    return 1 + sum(number > logits[token].item() for number in logits.tolist())


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_in_a_small_dtype_an_edit_of_logits_does_what_it_says_or_raises(dtype):
    lm, done, refused = lm_in(dtype, 5.0), 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        ids = [torch.randint(2, 320, (4,)).tolist()]
        plain = hk.forward(lm, ids).logits[0, -1]
        order = plain.sort(descending=True).indices.tolist()
        for margin in (0.001, 0.05, 3.0, None):
            forced = hk.forward(lm, ids, hk.force(319, margin=margin)).logits[0, -1]
            assert rank_of(forced, 319) == 1
            assert forced.max() > forced.masked_fill(torch.arange(320) == 319, -math.inf).max()
            assert torch.equal(forced[:319], plain[:319])
        for rank in (1, 2, 20, 160, 320):
            try:
                moved = hk.forward(lm, ids, hk.set_rank(order[7], rank)).logits[0, -1]
            except BadEdit:
                refused += 1
                assert rank not in (1, 320)
                continue
            done += 1
            assert rank_of(moved, order[7]) == rank
        tokens = order[:3]
        for prob in (0.3, 0.01):
            capped = hk.forward(lm, ids, hk.cap(*tokens, prob=prob)).logits[0, -1]
            assert capped.double().softmax(-1)[tokens].sum() <= max(prob, 0) + 1e-12
        limit = float(plain.max()) * 0.77
        assert (
            hk.forward(lm, ids, hk.cap(*tokens, logit=limit)).logits[0, -1][tokens].double()
            <= limit
        ).all()
        boosted = hk.forward(lm, ids, hk.boost(*tokens, by=1.7)).logits[0, -1]
        assert torch.equal(
            boosted[tokens],
            (plain[tokens].double() + torch.tensor(1.7, dtype=dtype).double()).to(dtype),
        )
        swapped = hk.forward(lm, ids, hk.swap(tokens[0], 319)).logits[0, -1]
        assert swapped[319] == plain[tokens[0]] and swapped[tokens[0]] == plain[319]
    assert done > refused
    with pytest.raises(BadEdit, match="changes nothing at logits"):
        hk.forward(lm, ids, hk.boost(order[0], by=1e-4))


@pytest.fixture(scope="module")
def broken() -> hk.LM:
    """A model that gives NaN for every logit after token 13, and numbers elsewhere."""
    lm = hk.tiny("llama")
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[13] = math.nan
    return lm


ROWS = [[5, 9, 13], [6, 7, 8]]  # only the first has the token


def test_nan_logits_are_nan_in_every_table_and_leave_other_rows_alone(broken):
    before, run = hk.forward(hk.tiny("llama"), ROWS), hk.forward(broken, ROWS)
    assert run.logits[0].isnan().all() and torch.equal(run.logits[1], before.logits[1])
    tables = {
        "ranks": hk.ranks(run, top=3, watch=[7]),
        "shift": hk.rank_shift(before, run, top=3),
        "summary": hk.stats.shift_summary(before, run),
        "uncertainty": hk.uncertainty(run, pos=-1),
        "surprisal": hk.surprisal(run, top=2),
        "lens": hk.logit_lens(broken, ROWS, top=2),
    }
    missing = {
        "ranks": ["logit", "logprob", "prob", "rank"],
        "shift": ["logit_after", "prob_after", "rank_after", "rank_delta"],
        "summary": [
            "kl",
            "kl_reverse",
            "js",
            "tv",
            "entropy_after",
            "margin_after",
            "top1_after",
            "top1_changed",
            "top_overlap",
        ],
        "uncertainty": [
            "entropy",
            "varentropy",
            "perplexity",
            "margin",
            "top1",
            "top1_prob",
            "nucleus_90",
            "top2",
        ],
        "surprisal": ["loss", "rank", "prob", "mean_loss", "perplexity"],
        "lens": ["logit", "prob", "rank", "entropy", "kl"],
    }
    for name, table in tables.items():
        spoilt, whole = (
            table[table["row"] == 0][missing[name]],
            table[table["row"] == 1][missing[name]],
        )
        assert spoilt.isna().all(axis=None), name
        assert whole.notna().all(axis=None), name
    assert tables["uncertainty"]["scenario"].tolist()[0] == "unknown"
    alone = hk.ranks(hk.forward(broken, [ROWS[1]]), top=3, watch=[7])
    assert alone["rank"].tolist() == tables["ranks"][tables["ranks"]["row"] == 1]["rank"].tolist()
    assert alone["rank"].dtype == "int64"


def test_nan_logits_are_nan_in_every_metric(broken):
    before, run = hk.forward(hk.tiny("llama"), ROWS), hk.forward(broken, ROWS)
    for metric in (
        hk.metrics.entropy(),
        hk.metrics.kl(before),
        hk.metrics.prob(3),
        hk.metrics.logprob(3),
        hk.metrics.rank(3),
        hk.metrics.logit_diff(3, 4),
        hk.metrics.logit(3),
    ):
        first, second = metric(run).tolist()
        assert math.isnan(first) and math.isfinite(second), metric
    spoil = hk.edit("embed", lambda x, here: x)  # the same model, without an edit
    table = hk.sweep(
        broken,
        [ROWS[0]],
        {"k": [1]},
        lambda k: spoil,
        [hk.metrics.kl(), hk.metrics.top1_changed()],
        progress=False,
    )
    assert table[["kl", "top1_changed"]].isna().all(axis=None)


def test_one_nan_logit_has_no_rank_and_nothing_is_first_beside_it():
    logits = torch.tensor([3.0, math.nan, 1.0, 2.0])
    lm = hk.tiny("llama")
    run = hk.forward(lm, IDS, hk.edit("logits", lambda x: x, pos=-1))
    run.logits[0, -1, :4] = logits + 100
    table = hk.ranks(run, top=None).set_index("token_id")
    assert math.isnan(table.loc[1, "rank"]) and not (table["rank"] == 1).any()
    assert hk.metrics.rank(1)(run).isnan().all() and hk.metrics.rank(0)(run).item() == 2


def test_edits_decisions_figures_and_reports_say_that_logits_are_nan(broken, tmp_path):
    for hook in (
        hk.force(3),
        hk.force(3, margin=2.0),
        hk.set_rank(3, 1),
        hk.ban(3, when=hk.when.entropy_above(1.0)),
    ):
        with pytest.raises(BadEdit, match="NaN"):
            hk.forward(broken, ROWS, hook)
    assert (
        hk.forward(broken, ROWS, hk.force(3, rows=1), hk.boost(4, by=1.0)).logits[1, -1].argmax()
        == 3
    )
    traced = hk.generate(broken, ROWS, trace=hk.trace(), max_new_tokens=1, do_sample=False)
    spoilt, whole = hk.decisions(traced)["why"].tolist()
    assert "NaN" in spoilt and whole.startswith("greedy: first of ")
    assert hk.candidates(traced)["rank"].isna().any()
    shift = hk.rank_shift(hk.forward(hk.tiny("llama"), ROWS), hk.forward(broken, ROWS), top=3)
    with pytest.raises(HookkitError, match="logits are NaN"):
        hk.figures.rank_bump(shift[shift["row"] == 0])
    with pytest.raises(HookkitError, match="logits of row 0 are NaN"):
        hk.direct_logits(hk.forward(broken, ROWS), 7)
    report = hk.shift_report(broken, ROWS, hk.ban(7), watch=[3])
    assert "logits are NaN" in report.write(tmp_path / "report").read_text()


def test_infinite_logits_keep_their_ranks_and_banned_ones_their_closed_forms():
    lm = hk.tiny("llama")
    plain = hk.forward(lm, IDS)
    run = hk.forward(lm, IDS, hk.edit("logits", lambda x: x))
    run.logits[0, -1, 5] = math.inf
    table = hk.ranks(run, top=2)
    assert table["rank"].tolist() == [1, 2] and table["token_id"][0] == 5
    assert math.isnan(hk.uncertainty(run, pos=-1)["entropy"].item())
    banned = hk.forward(lm, IDS, hk.ban(5, 6))
    probs = plain.logits[0, -1].double().softmax(-1)
    left = torch.cat([probs[:5], probs[7:]]) / (1 - probs[5] - probs[6])
    summary = hk.stats.shift_summary(plain, banned)
    assert summary["kl"].item() == math.inf
    assert summary["kl_reverse"].item() == pytest.approx(
        -math.log(1 - float(probs[5] + probs[6])), abs=1e-6
    )
    assert summary["entropy_after"].item() == pytest.approx(
        float(-(left * left.log()).sum()), abs=1e-6
    )
    gone = hk.ranks(banned, top=None).set_index("token_id").loc[[5, 6]]
    assert gone["rank"].tolist() == [319, 319] and gone["prob"].tolist() == [0.0, 0.0]
