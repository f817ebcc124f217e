"""Intervals: how often they have the true value, by simulation with fixed seeds; and against scipy where it has the same."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, HookkitError, OutOfRange
from hookkit.tables import intervals

COUNTS = (3, 5, 8, 20, 50)


def coverage(values: np.ndarray, true: float, **settings) -> float:
    """In how many of the rows' intervals the true mean is, by way of `over_prompts`."""
    cells, count = values.shape
    table = pd.DataFrame(
        {"cell": np.repeat(np.arange(cells), count), "row": np.tile(np.arange(count), cells)}
    )
    means = hk.stats.mean_over_prompts(
        table.assign(m=values.ravel()), by=["cell"], values=["m"], **settings
    )
    assert (means["n"] == count).all() and len(means) == cells
    return float(((means["m_low"] <= true) & (true <= means["m_high"])).mean())


@pytest.mark.parametrize("count", COUNTS)
def test_an_interval_of_95_percent_has_the_true_mean_of_normal_numbers_in_93_to_97_percent(count):
    draws = np.random.default_rng(count)
    assert (
        0.93
        <= coverage(draws.normal(size=(4000 if count < 50 else 2000, count)), 0.0, resamples=1000)
        <= 0.97
    )


@pytest.mark.parametrize("count", COUNTS)
def test_an_interval_of_95_percent_has_the_true_mean_of_lognormal_numbers_in_88_percent_or_more(
    count,
):
    draws = np.random.default_rng(100 + count)
    values = np.exp(draws.normal(size=(6000 if count < 20 else 2000, count)))
    sign = -1 if count == 5 else 1  # a long lower tail is as good
    assert coverage(sign * values, sign * np.exp(0.5), resamples=1000) >= 0.88


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_other_confidences_have_their_coverage(confidence):
    draws = np.random.default_rng(0)
    for count in (6, 40):
        share = coverage(
            draws.normal(size=(1500, count)), 0.0, confidence=confidence, resamples=1000
        )
        assert share == pytest.approx(confidence, abs=0.03)


@pytest.mark.parametrize("count", [2, 3, 10, 28])
def test_a_sample_without_skewness_has_the_t_interval_of_the_textbook(count):
    half = np.random.default_rng(0).normal(size=count // 2)
    values = np.concatenate([half, -half, [0.0] * (count % 2)]) + 7
    found = intervals.means(values[None], 0.9, 100, 0)
    low, high = scipy.stats.t.interval(0.9, count - 1, values.mean(), scipy.stats.sem(values))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high)) and found.method == "t"


def test_the_tails_of_a_t_interval_share_5_percent():
    values = np.exp(np.random.default_rng(0).normal(size=(50, 7)))
    found = intervals.means(values, 0.95, 100, 0)
    below, above = ((found.mean - found.low) / found.error, (found.high - found.mean) / found.error)
    assert scipy.stats.t.sf(below, 6) + scipy.stats.t.sf(above, 6) == pytest.approx(0.05)
    long = scipy.stats.skew(values, axis=1) > 0
    assert ((above > below) == long).all() and above.max() == pytest.approx(
        scipy.stats.t.isf(0.05 * 0.02, 6)
    )


def test_from_30_values_on_it_is_the_bca_bootstrap_of_scipy_expanded():
    values = np.exp(np.random.default_rng(2).normal(size=(1, 30)))
    found = intervals.means(values, 0.95, 40_000, 0)
    reach = np.sqrt(30 / 29) * scipy.stats.t.ppf(0.975, 29)  # in place of the normal's 1.96
    wider = 2 * scipy.stats.norm.cdf(reach) - 1
    true = scipy.stats.bootstrap(
        (values[0],),
        np.mean,
        confidence_level=wider,
        n_resamples=40_000,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low[0], found.high[0]) == pytest.approx(
        (true.low, true.high), rel=0.02
    ) and found.method == "BCa"
    assert intervals.means(values[:, :29], 0.95, 100, 0).method == "t"


def test_a_ratio_of_means_has_its_coverage():
    draws = np.random.default_rng(3)
    for count in (5, 12, 40):
        under = 3 + draws.normal(size=(3000, count))
        over = 0.4 * under + 0.3 * draws.normal(size=(3000, count))
        found = intervals.ratios(over, under, 0.95, 1000, 0)
        known = ((found.low <= 0.4) & (found.high >= 0.4))[np.isfinite(found.low)]
        assert 0.93 <= known.mean() <= 0.97 and len(known) > 2950


def test_fieller_s_interval_has_the_ratios_that_a_t_test_allows():
    draws = np.random.default_rng(4)
    under, over = 2 + draws.normal(size=9), 1 + draws.normal(size=9)
    found = intervals.ratios(over[None], under[None], 0.95, 100, 0)
    for end in (found.low[0], found.high[0]):
        assert scipy.stats.ttest_1samp(over - end * under, 0).pvalue == pytest.approx(0.05)
    assert found.method == "Fieller" and found.low[0] < found.mean[0] == pytest.approx(
        over.sum() / under.sum()
    )


def test_a_ratio_over_something_that_may_be_0_has_no_interval():
    draws = np.random.default_rng(5)
    for count in (6, 40):
        found = intervals.ratios(
            draws.normal(size=(1, count)), draws.normal(size=(1, count)), 0.95, 100, 0
        )
        assert np.isfinite(found.mean[0]) and np.isnan([found.low[0], found.high[0]]).all()


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (3, 20), (199, 200)])
def test_a_share_has_wilson_s_interval(hits, count):
    right = [True] * hits + [False] * (count - hits)
    table = pd.DataFrame({"cell": 0, "row": range(count), "right": right})
    found = hk.stats.mean_over_prompts(table, by=["cell"], values=["right"]).iloc[0]
    true = scipy.stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert (found["right_low"], found["right_high"]) == pytest.approx(
        (true.low, true.high), abs=1e-12
    )
    assert found["right"] == hits / count and found["interval"] == "Wilson"


def test_prompts_and_samples_are_both_a_sample():
    draws, hits = np.random.default_rng(6), 0
    for _ in range(800):
        values = (
            draws.normal(size=(10, 1)) + 2 * draws.normal(size=(1, 6)) + draws.normal(size=(10, 6))
        )
        both = intervals.two_way(values, 0.95)
        hits += both is not None and abs(values.mean()) <= both[1]
    assert 0.92 <= hits / 800 <= 0.98


@pytest.mark.parametrize("count", [3, 5, 12, 25])
def test_the_tails_lean_by_the_skewness_in_standard_errors_of_it(count):
    values = 0.3 * np.random.default_rng(count).normal(size=count)
    values[0] += 0.4  # some skewness, and not so much that the smaller tail has its least share
    standard_error = np.sqrt(6 * count * (count - 1) / ((count - 2) * (count + 1) * (count + 3)))
    standard_error *= (count - 2) / np.sqrt(count * (count - 1))  # for the biased estimate of scipy
    upper = 0.5 - 0.5 * np.tanh(2.0 * scipy.stats.skew(values) / standard_error)
    upper = np.clip(upper, 0.02, 0.98)
    found = intervals.means(values[None], 0.95, 100, 0)
    t = scipy.stats.t(count - 1)
    error = values.std(ddof=1) / np.sqrt(count)
    assert found.low[0] == pytest.approx(values.mean() - t.ppf(1 - 0.05 * (1 - upper)) * error)
    assert found.high[0] == pytest.approx(values.mean() + t.ppf(1 - 0.05 * upper) * error)


@pytest.mark.parametrize("excess", [0.98, 1.02, 3.0])
@pytest.mark.parametrize(("count", "vectors"), [(5, 4), (12, 6)])
def test_a_gain_over_random_vectors_has_satterthwaite_s_degrees_of_freedom(count, vectors, excess):
    """What a vector varies beyond random ones is added where an F test at 0.1 % says that it does."""
    between, rest = 0.7, 0.4
    limit = scipy.stats.f.ppf(0.999, count - 1, (count - 1) * (vectors - 1))
    expected = rest**2 * (1 + 1 / vectors)
    gains = np.random.default_rng(3).normal(size=count)
    gains = 1 + (gains - gains.mean()) / gains.std(ddof=1) * np.sqrt(expected * limit * excess)
    error, half = intervals.beyond_random(gains, between, rest, vectors, 0.95)
    variance, degrees = between**2 * (1 + 1 / vectors), vectors - 1
    if excess > 1:
        more = (expected * limit * excess - expected) / count
        degrees = (variance + more) ** 2 / (variance**2 / degrees + more**2 / (count - 1))
        variance += more
    assert error == pytest.approx(np.sqrt(variance))
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, degrees) * np.sqrt(variance))


def test_samples_that_each_prompt_draws_for_itself_are_no_second_way_to_vary():
    """Noise that is drawn anew for each prompt is averaged within the prompt; a shared sample is crossed with prompts."""
    draws = np.random.default_rng(1)
    values = draws.normal(size=(12, 1)) + 3 * draws.normal(size=(1, 4)) + draws.normal(size=(12, 4))
    prompts, samples = np.divmod(np.arange(48), 4)
    shared = pd.DataFrame({"cell": 0, "row": prompts, "sample": samples, "m": values.ravel()})
    own = shared.assign(prompt=prompts, row=np.arange(48))
    within = intervals.means(values.mean(axis=1)[None], 0.95, 10_000, 0)
    means = hk.stats.mean_over_prompts(own, by=["cell"], values=["m"])
    assert means["n"].item() == 12
    assert means[["m_low", "m_high"]].iloc[0].tolist() == pytest.approx(
        [within.low[0], within.high[0]]
    )
    half = intervals.two_way(values, 0.95)[1]
    crossed = hk.stats.mean_over_prompts(shared, by=["cell"], values=["m"])
    assert (crossed["m_high"] - crossed["m_low"]).item() == pytest.approx(2 * half)


# ---- what counts


def pairs(count: int = 6) -> pd.DataFrame:
    """One cell of pairs, as `patching` gives them; the metric of the last pair hardly differs, and its effect is huge."""
    draws = np.random.default_rng(0)
    before, way = draws.normal(size=count), 4 + draws.normal(size=count)
    way[-1] = 1e-6
    delta = 0.5 * way + 0.1 * draws.normal(size=count)
    table = pd.DataFrame(
        {"layer": 0, "row": range(count), "m": before + delta, "m_before": before, "m_delta": delta}
    )
    return table.assign(m_target=before + way, m_effect=delta / way)


def test_a_pair_that_hardly_differs_does_not_decide_the_effect():
    table = pairs()
    found = hk.stats.mean_over_prompts(table).iloc[0]
    way = table["m_target"] - table["m_before"]
    assert (
        found["m_effect"] == pytest.approx(table["m_delta"].sum() / way.sum())
        and abs(found["m_effect"] - 0.5) < 0.1
    )
    assert (
        found["m_effect_low"] < found["m_effect"] < found["m_effect_high"]
        and found["m_effect_n"] == 6
    )
    own = hk.stats.mean_over_prompts(table, effects="mean_of_ratios").iloc[0]
    assert (
        own["m_effect"] == pytest.approx(table["m_effect"].mean()) and abs(own["m_effect"]) > 1000
    )


def test_a_pair_that_does_not_differ_is_counted_for_what_it_is():
    table = pairs()
    table.loc[5, ["m", "m_delta", "m_target"]] = [table["m_before"][5], 0.0, table["m_before"][5]]
    table.loc[5, "m_effect"] = np.nan
    found = hk.stats.mean_over_prompts(table).iloc[0]
    way = table["m_target"] - table["m_before"]
    assert found["m_effect"] == pytest.approx(table["m_delta"].sum() / way.sum())
    assert (found["n"], found["m_delta_n"], found["m_effect_n"]) == (6, 6, 5)
    own = hk.stats.mean_over_prompts(table, effects="mean_of_ratios").iloc[0]
    assert own["m_effect"] == pytest.approx(table["m_effect"][:5].mean()) and own["m_effect_n"] == 5
    none = hk.stats.mean_over_prompts(table.assign(m_target=table["m_before"])).iloc[0]
    assert np.isnan(none["m_effect"]) and none["m_effect_n"] == 0 and none["m_delta_n"] == 6


def test_what_is_no_number_does_not_count_and_what_is_infinite_does():
    table = pd.DataFrame({"cell": [0] * 4 + [1] * 4, "row": [*range(4)] * 2})
    table["m"] = [1.0, np.nan, 3.0, 5.0, 1.0, -np.inf, 2.0, 3.0]
    first, second = (
        row for _, row in hk.stats.mean_over_prompts(table, by=["cell"], values=["m"]).iterrows()
    )
    assert (
        first["n"] == first["m_n"] == 3 and first["m"] == 3 and first["m_low"] < 3 < first["m_high"]
    )
    assert (
        second["m"] == -np.inf
        and second["m_n"] == 4
        and np.isnan([second["m_low"], second["m_se"]]).all()
    )
    nothing = hk.stats.mean_over_prompts(table.assign(m=np.nan), by=["cell"], values=["m"])
    assert (
        nothing["n"].tolist() == [0, 0]
        and nothing["m"].isna().all()
        and set(nothing["interval"]) == {""}
    )


def test_several_rows_of_one_prompt_are_one_prompt():
    values = np.random.default_rng(0).normal(size=(4, 5))
    table = pd.DataFrame(
        {"layer": np.repeat(range(4), 5), "row": np.tile(range(5), 4), "m": values.ravel()}
    )
    found = hk.stats.mean_over_prompts(table.assign(all=1), by=["all"], values=["m"]).iloc[0]
    true = intervals.means(values.mean(axis=0)[None], 0.95, 100, 0)
    assert found["n"] == 5 and found["m_low"] == pytest.approx(true.low[0])
    assert hk.stats.mean_over_prompts(table, by=["row"], values=["m"])["n"].tolist() == [4] * 5


def test_a_cell_s_interval_does_not_depend_on_the_other_cells():
    values = np.random.default_rng(0).normal(size=(3, 40))
    table = pd.DataFrame(
        {"layer": np.repeat(range(3), 40), "row": np.tile(range(40), 3), "m": values.ravel()}
    )
    every = hk.stats.mean_over_prompts(table, by=["layer"], values=["m"])
    alone = hk.stats.mean_over_prompts(table[table["layer"] == 2], by=["layer"], values=["m"])
    pd.testing.assert_frame_equal(every.iloc[2:].reset_index(drop=True), alone)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"effects": "ratio"}, HookkitError, "ratio_of_means"),
        ({"resamples": 0}, OutOfRange, "resamples=0"),
        ({"resamples": True}, HookkitError, "resamples=True"),
        ({"confidence": 1}, BadHook, "confidence=1"),
    ],
)
def test_misuse_says_what_is_wrong(settings, error, words):
    with pytest.raises(error, match=words):
        hk.stats.mean_over_prompts(pairs(), **settings)
    with pytest.raises(EmptySelection, match="no row"):
        hk.stats.mean_over_prompts(pairs().head(0))


# ---- the strongest cells


def null_cells(draws: np.random.Generator, cells: int, count: int) -> pd.DataFrame:
    """Cells without any effect."""
    values = draws.normal(size=cells * count)
    table = pd.DataFrame(
        {"head": np.repeat(range(cells), count), "row": np.tile(range(count), cells)}
    )
    return table.assign(m=values, m_before=0.0, m_delta=values)


def test_the_strongest_of_many_cells_are_chosen_on_one_half_and_measured_on_the_other():
    draws, hits, chosen = np.random.default_rng(0), 0, []
    for _ in range(300):
        best = hk.stats.strongest(null_cells(draws, 60, 16), top=1).iloc[0]
        hits += best["m_delta_low"] <= 0 <= best["m_delta_high"]
        chosen.append(best["m_delta_chosen"])
    assert 0.92 <= hits / 300 <= 0.98, "the interval has nothing of the choice in it"
    assert np.abs(chosen).mean() > 0.7, "which on the half that chose is large"
    table = null_cells(draws, 60, 16)
    means = hk.stats.mean_over_prompts(table[table["row"] % 2 == 0]).set_index("head")["m_delta"]
    best = hk.stats.strongest(table, top=3)
    assert (
        best["head"].tolist() == means.abs().nlargest(3).index.tolist()
        and best["n"].tolist() == [8] * 3
    )
    assert best["m_delta_chosen"].tolist() == pytest.approx(means[best["head"]].tolist())
    other = hk.stats.mean_over_prompts(table[table["row"] % 2 == 1]).set_index("head")
    assert best["m_delta_low"].tolist() == pytest.approx(
        other.loc[best["head"], "m_delta_low"].tolist()
    )
    for toward, wanted in (("up", means.nlargest(3)), ("down", means.nsmallest(3))):
        assert (
            hk.stats.strongest(table, top=3, toward=toward)["head"].tolist()
            == wanted.index.tolist()
        )


def test_a_control_is_not_among_the_strongest_and_few_prompts_are_refused():
    table = null_cells(np.random.default_rng(0), 6, 8)
    control = table.assign(control=True, m_delta=100.0)
    both = pd.concat([table.assign(control=False), control])
    assert set(hk.stats.strongest(both, top=9)["control"]) == {False}
    with pytest.raises(OutOfRange, match="3 prompts: cells are chosen on one half.*at least 4"):
        hk.stats.strongest(table[table["row"] < 3])
    with pytest.raises(HookkitError, match="no column 'q_delta'"):
        hk.stats.strongest(table, value="q_delta")
    with pytest.raises(HookkitError, match="top=0"):
        hk.stats.strongest(table, top=0)
    with pytest.raises(HookkitError, match="toward='big'"):
        hk.stats.strongest(table, toward="big")


# ---- figures


def layers(count: int) -> pd.DataFrame:
    """Three layers of pairs."""
    return pd.concat([pairs(count).assign(layer=layer) for layer in range(3)], ignore_index=True)


def test_lines_have_a_band_from_10_prompts_on_and_points_below():
    for count, bands, points in ((9, 0, 27), (10, 1, 0), (40, 1, 0)):
        for table, shown in (
            (layers(count), points),
            (hk.stats.mean_over_prompts(layers(count)), 0),
        ):
            axes = hk.figures.interval_lines(table, value="m_delta").axes[0]
            assert len(axes.collections) == bands
            dots = [line for line in axes.get_lines() if line.get_marker() == "."]
            assert sum(len(line.get_xdata()) for line in dots) == shown  # pyright: ignore[reportArgumentType]
    means = hk.stats.mean_over_prompts(layers(9))["m_delta"]
    line = hk.figures.interval_lines(layers(9), value="m_delta").axes[0].get_lines()[0]
    assert line.get_ydata() == pytest.approx(means.to_numpy())  # pyright: ignore[reportArgumentType]


def test_a_map_has_the_ratio_of_the_means_in_its_cells():
    table = layers(6).assign(pos=0)
    drawn = hk.figures.heat_map(table, named=1).axes[0].texts[0].get_text()
    assert (
        drawn == f"{hk.stats.mean_over_prompts(table)['m_effect'][0]:.2g}" and abs(float(drawn)) < 1
    )
