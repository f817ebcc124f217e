"""Statistics: what one pass gives is what numpy gives with everything in memory; and ablation puts their means in."""

import numpy as np
import pytest
import torch
from by_hand import captured, edited_logits
from conftest import tiny
from killing import texts

import hookkit as hk
from hookkit.data.harvest.statistics import compute_moments, merge_moments
from hookkit.errors import (
    BadHook,
    DamagedHarvest,
    EmptySelection,
    NotCaptured,
    OutOfRange,
    Unsupported,
)

SITES = ["resid_post.1", "z.2", "mlp_post.0"]
SMALL = {"batch_tokens": 64, "progress": False}
ROWS = texts(count=60)


def by_hand(lm, site: str, given=None) -> np.ndarray:
    """What plain transformers has at a site, for one text after the other, all in memory: [row, ...] in float64."""
    name, layer = site.split(".")
    found = [
        captured(lm.root, row, name, int(layer))[0] for row in (ROWS if given is None else given)
    ]
    return torch.cat(found).double().numpy()


def near(found: torch.Tensor, wanted: np.ndarray, within: float = 1e-5) -> None:
    assert found.dtype == torch.float64
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy() - wanted).max() <= within * np.abs(wanted).max()


def check(found: "hk.types.Statistics", site: str, values: np.ndarray, within: float) -> None:
    each = found[site]
    lengths = np.linalg.norm(values, axis=-1)
    assert each.count == len(values)
    near(each.mean, values.mean(0), within)
    near(each.variance, values.var(0), within)
    near(each.std, values.std(0), within)
    near(each.norm.mean, lengths.mean(0), within)
    near(each.norm.std, lengths.std(0), within)
    near(each.norm.min, lengths.min(0), within)
    near(each.norm.max, lengths.max(0), within)
    heads = values[:, None] if values.ndim == 2 else values
    wanted = np.stack(
        [np.cov(heads[:, head], rowvar=False, bias=True) for head in range(heads.shape[1])]
    )
    near(each.covariance, wanted if values.ndim == 3 else wanted[0], within)


@pytest.fixture(scope="module")
def found(llama) -> "hk.types.Statistics":
    return hk.stats.activation_statistics(llama, iter(ROWS), SITES, covariance=True, top=4, **SMALL)


@pytest.fixture(scope="module")
def harvest(llama, tmp_path_factory) -> hk.types.Harvest:
    return hk.harvest(
        llama, ROWS, SITES, tmp_path_factory.mktemp("harvest"), shard_size=200, **SMALL
    )


@pytest.mark.parametrize("site", SITES)
def test_one_pass_gives_what_numpy_gives_with_everything_in_memory(llama, found, site):
    check(found, site, by_hand(llama, site), 1e-5)


@pytest.mark.parametrize("site", SITES)
def test_statistics_of_a_harvest_need_no_model(harvest, site):
    made = harvest.statistics(covariance=True)
    check(made, site, harvest[site][:].double().numpy(), 1e-12)
    assert made.about["texts"] == 60
    assert [str(each) for each in harvest.statistics("z.2.3").sites] == ["z.2.3"]
    near(
        harvest.statistics("z.2.3")["z.2.3"].mean,
        harvest["z.2"][:].double().numpy()[:, 3].mean(0),
        1e-12,
    )


def test_one_head_has_the_statistics_that_it_has_alone(llama, found):
    alone = hk.stats.activation_statistics(llama, ROWS, "z.2.1", covariance=True, top=4, **SMALL)[
        "z.2.1"
    ]
    of_all = found["z.2.1"]
    assert torch.equal(of_all.mean, alone.mean)
    assert torch.equal(of_all.norm.max, alone.norm.max)
    assert torch.allclose(of_all.covariance, alone.covariance, rtol=1e-12)
    assert of_all.top(5).equals(alone.top(5))
    assert of_all.top(5).equals(found["z.2"].top((1, 5)))


def test_only_the_positions_asked_for_count(llama, harvest):
    given = [row for row in ROWS if len(row) > 1]
    made = hk.stats.activation_statistics(
        llama, given, "resid_post.1", pos=slice(1, None), covariance=True, **SMALL
    )
    values = np.concatenate([by_hand(llama, "resid_post.1", [row])[1:] for row in given])
    check(made, "resid_post.1", values, 1e-5)
    check(
        harvest.statistics("resid_post.1", pos=slice(1, None), covariance=True),
        "resid_post.1",
        values,
        1e-5,
    )
    last = harvest.statistics("resid_post.1", pos=-1, covariance=True)
    check(
        last,
        "resid_post.1",
        np.concatenate([by_hand(llama, "resid_post.1", [row])[-1:] for row in ROWS]),
        1e-5,
    )


def test_a_large_mean_costs_a_small_variance_no_digits():
    values = 1e8 + np.random.default_rng(0).normal(size=(5000, 3))
    total = None
    for part in np.split(values, [7, 8, 1000, 4999]):
        total = merge_moments(total, compute_moments(torch.tensor(part), covariance=True))
    assert np.allclose((total.spread / 5000).numpy(), values.var(0), rtol=1e-7)
    assert np.allclose(
        (total.products / 5000).numpy(),
        np.cov(values, rowvar=False, bias=True),
        rtol=1e-6,
        atol=1e-8,
    )


# ---- the strongest tokens


def largest(values: torch.Tensor, top: int) -> list[list[int]]:
    """For each unit the rows of its largest values; of equal ones the earlier first."""
    units = values.flatten(1).T.tolist()
    return [sorted(range(len(unit)), key=lambda row: (-unit[row], row))[:top] for unit in units]


@pytest.mark.parametrize("top", [1, 7, 10_000])
def test_the_strongest_tokens_of_a_unit_are_those_of_a_full_sort_even_among_equals(tmp_path, top):
    rectified = hk.tiny("opt")  # a rectifier makes most neurons zero at most tokens
    kept = hk.harvest(rectified, ROWS, "mlp_post.1", tmp_path, shard_size=10_000, **SMALL)
    values = kept["mlp_post.1"][:]
    assert (values == 0).float().mean() > 0.2
    for made in (
        hk.stats.activation_statistics(rectified, ROWS, "mlp_post.1", top=top, **SMALL),
        kept.statistics(top=top),
    ):
        for unit, rows in enumerate(largest(values, top)):
            table = made["mlp_post.1"].top(unit)
            assert list(table.columns) == ["text", "piece", "pos", "token_id", "value"]
            assert table["value"].tolist() == values[rows, unit].tolist()
            wanted = kept.table(rows).drop(columns="row")
            assert table.drop(columns="value").equals(wanted)


def test_a_strong_token_is_shown_as_text_where_there_is_a_model(llama, found):
    table = found["mlp_post.0"].top(3, llama)
    assert table["token"].tolist() == [llama.string(token) for token in table["token_id"]]
    first = table.iloc[0]
    assert ROWS[first["text"]][first["pos"]] == first["token_id"]
    values = by_hand(llama, "mlp_post.0")[:, 3]
    assert abs(first["value"] - values.max()) <= 1e-5 * np.abs(values).max()


# ---- what statistics are as a value


def test_saved_statistics_come_back_as_they_were(tmp_path, llama, found):
    back = hk.results.load_statistics(found.save(tmp_path / "statistics.safetensors"))
    assert list(back.sites) == list(found.sites)
    assert back.about == found.about
    for site in SITES:
        for name in ("mean", "variance", "covariance"):
            assert torch.equal(getattr(back[site], name), getattr(found[site], name))
        assert torch.equal(back[site].norm.std, found[site].norm.std)
    assert back["mlp_post.0"].top(9).equals(found["mlp_post.0"].top(9))
    assert back.table().equals(found.table())
    plain = hk.results.save_tensors({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        DamagedHarvest, match="'other.safetensors' has no statistics: give a file that"
    ):
        hk.results.load_statistics(plain)


def test_the_table_has_a_row_for_each_site_and_head(found):
    table = found.table()
    assert list(table.columns) == [
        "site", "head", "count", "norm_mean", "norm_std", "norm_min", "norm_max", "mean_norm",
    ]  # fmt: skip
    assert table["site"].tolist() == ["resid_post.1", "z.2", "z.2", "z.2", "z.2", "mlp_post.0"]
    assert table["mean_norm"][2] == found["z.2"].mean[1].norm().item()
    assert table["norm_max"][0] == found["resid_post.1"].norm.max.item()


def test_statistics_say_of_what_they_are(llama, tmp_path):
    given = [ROWS[0], [], ROWS[1], []]
    kept = hk.harvest(llama, given, "resid_post.1", tmp_path, on_error="skip", **SMALL).statistics(
        pos=-1
    )
    assert (kept.about["texts"], kept.about["left_out"], kept.about["pos"]) == (4, 2, "-1")
    assert kept["resid_post.1"].count == 2
    made = hk.stats.activation_statistics(llama, given, "resid_post.1", on_error="skip", **SMALL)
    assert (made.about["texts"], made.about["left_out"], made.about["pos"]) == (4, 2, "None")
    again = hk.stats.activation_statistics(llama, ["tea"], "resid_post.1", **SMALL)
    assert made.about["stream"] != again.about["stream"]
    assert repr(again).startswith("Statistics(2 tokens of 1 text; 1 site: resid_post.1)\n  next: ")
    assert repr(again["resid_post.1"]) == "SiteStatistics(resid_post.1, [32], 2 tokens)"


def test_a_stream_is_read_no_further_ahead_than_a_window(llama):
    at, forwards = [], []

    def stream():
        for row in texts(count=300):
            at.append((len(forwards), len(row)))
            yield row

    hook = llama.root.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        hk.stats.activation_statistics(llama, stream(), "resid_post.0", **SMALL)
    finally:
        hook.remove()
    ahead = [
        sum(tokens for number, tokens in at if number == each)
        for each in {number for number, _ in at}
    ]
    assert max(ahead) < 16 * 64 + 24
    assert len(ahead) > 3


def test_what_has_no_statistics_is_refused(llama, found, harvest, tmp_path):
    bare = hk.stats.activation_statistics(llama, ROWS[:2], "resid_post.1", **SMALL)
    for wish, error, words in (
        (lambda: bare["resid_post.1"].covariance, NotCaptured, "ask for it with covariance=True"),
        (lambda: bare["resid_post.1"].top(3), NotCaptured, "ask for them with top=10"),
        (
            lambda: bare["resid_post.2"],
            NotCaptured,
            "no statistics of resid_post.2: there are those of 1 site",
        ),
        (
            lambda: bare["resid_post.1"].head(0),
            NotCaptured,
            "head 0 of resid_post.1 was asked for, which has 0 heads",
        ),
        (lambda: found["z.2.4"], NotCaptured, "head 4 of z.2 was asked for, which has 4 heads"),
        (
            lambda: found["mlp_post.0"].top(48),
            OutOfRange,
            r"unit 48 of mlp_post.0 .* counted \[48\] from 0",
        ),
        (
            lambda: found["z.2"].top(3),
            OutOfRange,
            r"unit 3 of z.2 was asked for, and its units are counted \[4, 8\]",
        ),
        (
            lambda: hk.stats.activation_statistics(llama, ROWS, "z.1", top=-1, **SMALL),
            BadHook,
            "top=-1: give how many tokens are kept",
        ),
        (
            lambda: hk.stats.activation_statistics(llama, ROWS, "pattern.1", **SMALL),
            BadHook,
            "a statistic keeps as many numbers for",
        ),
        (
            lambda: hk.stats.activation_statistics(llama, [], "z.1", **SMALL),
            EmptySelection,
            "none of the 0 texts",
        ),
        (lambda: harvest.statistics("z.0"), NotCaptured, "z.0 was not harvested"),
        (
            lambda: harvest.statistics(pos=hk.at("tea")),
            BadHook,
            "a harvest has token ids only, and finds no text",
        ),
        (lambda: harvest.statistics(pos=20), OutOfRange, "position 20 was asked for"),
        (lambda: harvest.statistics(pos=slice(99, None)), EmptySelection, "rows is at pos="),
    ):
        with pytest.raises(error, match=words):
            wish()
    last = hk.harvest(llama, ROWS, "z.1", tmp_path, pos=-1, **SMALL)
    with pytest.raises(
        NotCaptured,
        match="position 0 of text 0 was asked for, and was not harvested: 1 of its positions",
    ):
        last.statistics(pos=0)


def test_numbers_of_which_a_mean_says_nothing_are_refused(small_tokenizer):
    with pytest.raises(BadHook, match="experts.1 holds ids or indices, whose mean has no meaning"):
        hk.stats.activation_statistics(hk.tiny("mixtral"), ROWS[:2], "experts.1", **SMALL)
    own = hk.LM(tiny("llama"), small_tokenizer)
    with torch.no_grad():
        own.root.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(
        Unsupported,
        match="embed is not a finite number at position 2 of text 1, so its mean would",
    ):
        hk.stats.activation_statistics(own, [[1, 2], [3, 4, 7, 5]], "embed", **SMALL)


# ---- ablation


@pytest.mark.parametrize(
    ("site", "name", "layer"), [("resid_post.1", "resid_post", 1), ("z.2", "z", 2)]
)
def test_ablation_puts_in_the_mean_that_one_computes_by_hand(llama, found, site, name, layer):
    mean = torch.tensor(by_hand(llama, site).mean(0)).float()
    run = hk.forward(llama, [5, 6, 7, 8], hk.ablate(site, to=found))
    wanted = edited_logits(
        llama.root, [5, 6, 7, 8], name, layer, lambda x: mean.reshape(-1).expand_as(x).clone()
    )
    assert (run.logits - wanted).abs().max() <= 1e-4
    assert (wanted - hk.forward(llama, [5, 6, 7, 8]).logits).abs().max() > 0.1
    same = hk.ablate(site, to=found[site].mean)
    assert torch.equal(run.logits, hk.forward(llama, [5, 6, 7, 8], same).logits)


def test_one_head_is_ablated_with_the_statistics_of_all(llama, found):
    mean = torch.tensor(by_hand(llama, "z.2").mean(0)).float()[3]

    def edit(x: torch.Tensor) -> torch.Tensor:
        new = x.clone()
        new[:, 1, 24:] = mean
        return new

    run = hk.forward(llama, [5, 6, 7, 8], hk.ablate("z.2.3", to=found, pos=1))
    assert (run.logits - edited_logits(llama.root, [5, 6, 7, 8], "z", 2, edit)).abs().max() <= 1e-4


def test_a_bare_name_means_every_layer_that_has_statistics(llama):
    made = hk.stats.activation_statistics(llama, ROWS[:9], ["z.0", "z.2"], **SMALL)
    hook = hk.ablate("z", to=made)
    assert [str(site) for site in hook.sites] == ["z.0", "z.2"]
    one_by_one = [hk.ablate(site, to=made[site].mean) for site in ("z.0", "z.2")]
    logits = hk.forward(llama, [5, 6, 7], hook).logits
    assert torch.equal(logits, hk.forward(llama, [5, 6, 7], *one_by_one).logits)
    heads = hk.ablate(llama.sites("z", layers=[0], heads=[0, 3]), to=made)
    assert [each.tensor.shape for each in heads.to.tensors] == [(8,), (8,)]


def test_an_ablation_with_means_is_a_value_that_goes_to_json_and_back(llama, found, tmp_path):
    hook = hk.ablate(["z.2.1", "resid_post.1"], to=found)
    back = hk.types.Hook.from_json(hook.to_json())
    assert back == hook
    assert hook == hk.ablate(
        ["z.2.1", "resid_post.1"],
        to=hk.results.load_statistics(found.save(tmp_path / "s.safetensors")),
    )
    assert hook != hk.ablate(["z.2.2", "resid_post.1"], to=found)
    assert str(hook) == "ablate(z.2.1, resid_post.1, to=means)"
    assert torch.equal(
        hk.forward(llama, [5, 6], back).logits, hk.forward(llama, [5, 6], hook).logits
    )


def test_ablation_where_there_are_no_statistics_is_refused(llama, found, harvest):
    with pytest.raises(
        NotCaptured, match="there are no statistics of z.1: there are those of 3 sites"
    ):
        hk.ablate("z.1", to=found)
    with pytest.raises(NotCaptured, match="the source captured no attn_out: it has 3 sites"):
        hk.ablate("attn_out", to=found)
    with pytest.raises(BadHook, match="the tensor is a Harvest"):
        hk.ablate("z.2", to=harvest)
    with pytest.raises(
        BadHook,
        match="to='middle' is unknown: give 'zero', 'mean', 'resample', a tensor, statistics",
    ):
        hk.ablate("z.2", to="middle")
