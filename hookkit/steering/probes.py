"""Probes fitted to labelled texts, with the controls without which their numbers say little.

    probes = hk.fit_probe(lm, texts, labels, "resid_post")
    probes.table                       # a line for each site
    probes.best, probes.probe("resid_post.12")

Every number is held out: a fold's texts are scored by a classifier that was fitted to the other
folds. Beside it stand the same procedure with shuffled labels, and a classifier that sees the
text alone.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from ..arguments import as_items, check_arguments, check_integer, check_number, describe
from ..display import count_of, describe_outcome, first_rows, progress_bar, render_html
from ..errors import BadHook, BadPrompt, MissingExtra, NotCaptured, TooFew
from ..hooks.base import Constant
from ..hooks.probe import Probe
from ..models.lm import LM
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, SitesLike, parse_site
from ..models.tokens import prompt_text
from ..tables.intervals import Auroc, auroc, auroc_difference, further_draws
from .directions import BATCH, SiteStatistics, collect_statistics, median_length, provenance

CONFIDENCE = 0.95
MAX_TRIES = 100  # draws for each one whose folds all have both labels
LARGEST_SEED = 2**32 - 1  # of scikit-learn
MAX_STEPS = 10_000  # of a fit; scikit-learn warns if it did not converge


@dataclass(frozen=True, eq=False, repr=False)
class Probes:
    """What `fit_probe` returns: probes of several sites, and how well they do.

    table     a line for each site:
              site, layer (if every site has one);
              auroc, the share of pairs of a positive and a negative text of one fold in which the
              positive one scores higher, with its 95 % interval auroc_low and auroc_high;
              text_only, that of the text-only baseline; above_text (auroc minus text_only),
              above_text_low and above_text_high;
              shuffled, the mean with shuffled labels, and shuffled_low and shuffled_high, between
              which one more draw lies in 95 of 100 cases;
              text_only_low, text_only_high; n (texts), n_positive, n_groups, folds
    held_out  a line for each text: text (its index), label, group, fold, text_only (the
              baseline's logit) and a column for each site (the probe's logit)
    all       the probes, each fitted to all texts
    """

    table: pd.DataFrame
    held_out: pd.DataFrame
    all: tuple[Probe, ...]

    @property
    def best(self) -> Probe:
        """The probe of the site with the largest held-out AUROC.

        Of many sites, the largest number is a little too large by choice: look at it again on
        texts that no fit has seen.
        """
        return self.all[int(self.table["auroc"].to_numpy().argmax())]

    def probe(self, site: str | AnySite) -> Probe:
        """Returns the probe of a site, fitted to all texts."""
        key = parse_site(site) if isinstance(site, str) else site
        for probe in self.all:
            if probe.site == key:
                return probe
        sites = ", ".join(str(probe.site) for probe in self.all)
        raise NotCaptured(f"there is no probe of {key}: there are those of {sites}")

    def _repr_html_(self) -> str:
        columns = ("site", "auroc", "auroc_low", "auroc_high", "text_only", "above_text_low")
        return render_html(self._summary, rows=first_rows(self.table, *columns))

    @property
    def _summary(self) -> str:
        line = self.table.iloc[int(self.table["auroc"].to_numpy().argmax())]
        negative, positive = self.best.about["labels"]
        control = f", shuffled labels {line['shuffled']:.3f}" if "shuffled" in line else ""
        return (
            f"Probes({positive!r} or {negative!r}, {count_of(len(self.all), 'site')}, "
            f"{count_of(int(line['n']), 'text')}; best {line['site']}: "
            f"AUROC {line['auroc']:.3f} [{line['auroc_low']:.3f}, {line['auroc_high']:.3f}], "
            f"text alone {line['text_only']:.3f}{control})"
        )

    def __repr__(self) -> str:
        calls = ("probes.table", "probes.best", f"probes.probe({str(self.all[0].site)!r})")
        return describe_outcome(self._summary, *calls)


@check_arguments
def fit_probe(
    lm: LM,
    texts: Prompts,
    labels: Iterable[Any],
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    groups: Iterable[Any] | None = None,
    folds: int = 5,
    c: float = 0.01,
    shuffles: int = 20,
    seed: int = 0,
    batch: int = BATCH,
    progress: bool | None = None,
) -> Probes:
    """Returns a linear probe of each site for two labels of texts, with a table of how well each
    does on texts that it was not fitted to.

    labels    one of two values for each text. The larger one is the positive label (True, 1, the
              last in the alphabet)
    pos       where each text is read: its last token; or several positions, whose mean is used
    groups    texts with something in common (an author, a template), as a value for each: all
              texts of a group are in one fold. Without it, equal texts are a group
    folds     into how many parts the texts are divided, with both labels in the same shares
    c         scikit-learn's C, the inverse strength of the L2 penalty; it is not chosen by
              held-out numbers. The default is strong, for sites with more numbers than texts
    shuffles  how often the whole procedure is repeated with shuffled labels; 0 for never. Labels
              are shuffled between groups if each group has one label, and else between texts
    batch     texts that run together; of each, only one vector for each site is kept
    progress  True or False; the default is to show a bar of the sites in a terminal

    The classifier is scikit-learn's logistic regression on values that are standardised within
    each training part, which `direction` and `bias` of the probe include. The text-only baseline
    is the same regression (C=1) on the words of the text (tf-idf; token ids if the model has no
    tokenizer) and its numbers of tokens and characters, in the same folds: a probe that is not
    above it has shown nothing about the model. The intervals allow for fits that share texts
    (Nadeau and Bengio 2003). Where there is nothing to find, an area is rather below 0.5 than at
    it: a label that is frequent in a held-out part is rare in the others.

    The result has `table`, `best`, `probe(site)` and `held_out`. The same call gives the same
    numbers. Raises `BadHook` for labels that are not of two values or not as many as texts, and
    for a site with heads; `TooFew` if a label has fewer texts, or groups, than there are folds;
    `MissingExtra` without scikit-learn.

    Alain and Bengio 2016; Hewitt and Liang 2019 (controls).

    >>> texts = ["I love it", "It is great", "So good", "I hate it", "It is bad", "So sad"]
    >>> labels = ["good"] * 3 + ["bad"] * 3
    >>> probes = fit_probe(lm, texts, labels, ["resid_post.6", "resid_post.12"], folds=3)
    >>> probes.probe("resid_post.12").about["labels"]
    ['bad', 'good']
    """
    check_integer(folds, "folds", least=2, meaning="how many parts the texts have,", error=BadHook)
    check_number(c, "c", above=0, meaning="an inverse strength of the penalty,")
    check_integer(shuffles, "shuffles", least=0, meaning="how many draws,", error=BadHook)
    check_integer(seed, "seed", least=0, most=LARGEST_SEED, meaning="a seed,", error=BadHook)
    _require_sklearn()
    rows = as_batch(lm, texts).rows
    names, is_positive = _read_labels(labels, len(rows))
    study = Study(is_positive, _read_groups(groups, rows), folds, shuffles, seed, names)
    scores = {"text_only": study.scores(_text_model(), _text_features(lm, rows))}
    statistics = _statistics_by_length(lm, rows, sites, pos, batch)
    about = _origin(lm, pos, rows, study) | {"c": c, "folds": folds, "seed": seed}
    lines, probes, model = [], [], _linear_model(c)
    for site, of_site in progress_bar(progress, iterable=list(statistics.items()), unit="site"):
        values = of_site.means.numpy()
        scores[str(site)] = study.scores(model, values)
        areas = study.area(scores[str(site)]), study.area(scores["text_only"])
        line = _line(*areas, study.shuffled_areas(model, values))
        lines.append({"site": str(site), "layer": getattr(site, "layer", None), **line})
        norm = median_length(of_site.lengths)
        fitted = model.fit(values, is_positive)
        probes.append(_as_probe(fitted, site, norm, about | {"held_out": _rounded(line)}))
    table = pd.DataFrame(lines).assign(**study.counts)
    if bool(table["layer"].isna().any()):
        table = table.drop(columns="layer")
    return Probes(table, study.with_scores(scores), tuple(probes))


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise MissingExtra(
            f"hk.fit_probe needs scikit-learn, which cannot be imported ({error}): "
            "pip install 'hookkit[probes]'"
        ) from error


# ---- labels, groups and folds


@dataclass(frozen=True, eq=False)
class Study:
    """The labels and groups of texts, their folds, and the folds of shuffled labels."""

    is_positive: Bool[np.ndarray, " text"]
    groups: Int[np.ndarray, " text"]
    n_folds: int
    shuffles: int
    seed: int
    labels: tuple[Any, Any]  # the negative and the positive one

    @cached_property
    def folds(self) -> Int[np.ndarray, " text"]:
        """The fold of each text. Raises `TooFew` if a fold has texts of one label only."""
        for name, has_label in zip(self.labels, (~self.is_positive, self.is_positive), strict=True):
            count = len(np.unique(self.groups[has_label]))
            if count < self.n_folds:
                raise TooFew(
                    f"the label {name!r} has {count_of(int(has_label.sum()), 'text')} in "
                    f"{count_of(count, 'group')}, and {self.n_folds} folds need one in each: give "
                    "more texts, or fewer folds="
                )
        folds = self._divide(self.is_positive)
        if folds is None:
            raise TooFew(
                f"the {len(np.unique(self.groups))} groups do not divide into {self.n_folds} folds "
                "with both labels in each: give fewer folds=, or more and smaller groups"
            )
        return folds

    def _divide(self, is_positive: Bool[np.ndarray, " text"]) -> Int[np.ndarray, " text"] | None:
        """Returns the fold of each text, or None if one has texts of one label only."""
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        splitter, groups = StratifiedGroupKFold, self.groups
        if len(np.unique(groups)) == len(groups):
            splitter, groups = StratifiedKFold, None
        parts = splitter(self.n_folds, shuffle=True, random_state=self.seed)
        folds = np.zeros(len(is_positive), dtype=int)
        for fold, (_, held_out) in enumerate(parts.split(folds, is_positive, groups)):
            folds[held_out] = fold
            if len(np.unique(is_positive[held_out])) < 2:
                return None
        return folds

    @cached_property
    def shuffled(self) -> list[tuple[Bool[np.ndarray, " text"], Int[np.ndarray, " text"]]]:
        """Shuffled labels and their folds, the same ones for every site."""
        generator = np.random.default_rng(self.seed)
        _, first, index = np.unique(self.groups, return_index=True, return_inverse=True)
        label_of_group = self.is_positive[first]
        is_constant = np.array_equal(label_of_group[index], self.is_positive)
        draws = []
        for _ in range(MAX_TRIES * self.shuffles):
            if is_constant:
                is_positive = generator.permutation(label_of_group)[index]
            else:
                is_positive = generator.permutation(self.is_positive)
            folds = self._divide(is_positive)
            if folds is not None:
                draws.append((is_positive, folds))
            if len(draws) == self.shuffles:
                return draws
        if not self.shuffles:
            return draws
        raise TooFew(
            f"shuffled labels rarely have both labels in each of {self.n_folds} folds of these "
            "groups: give fewer folds=, or shuffles=0"
        )

    def scores(self, model: Any, features: Any) -> Float[np.ndarray, " text"]:
        """Returns the logit of each text, from a fit of the model to the other folds."""
        return _held_out(model, features, self.is_positive, self.folds)

    def area(self, scores: Float[np.ndarray, " text"]) -> Auroc:
        """Returns the area under the ROC curve of held-out scores."""
        return auroc(scores, self.is_positive, self.folds, self.groups)

    def shuffled_areas(self, model: Any, features: Any) -> list[float]:
        """Returns the areas of the whole procedure with shuffled labels."""
        areas = []
        for is_positive, folds in self.shuffled:
            scores = _held_out(model, features, is_positive, folds)
            areas.append(auroc(scores, is_positive, folds, self.groups).value)
        return areas

    @property
    def counts(self) -> dict[str, int]:
        """The columns of the table that say how many texts there are."""
        n_groups = len(np.unique(self.groups))
        counts = {"n": len(self.groups), "n_positive": int(self.is_positive.sum())}
        return counts | {"n_groups": n_groups, "folds": self.n_folds}

    def with_scores(self, scores: dict[str, Float[np.ndarray, " text"]]) -> pd.DataFrame:
        """Returns a table with a line for each text: its label, group, fold and scores."""
        labels = [self.labels[int(positive)] for positive in self.is_positive]
        columns = {"text": range(len(labels)), "label": labels, "group": self.groups}
        return pd.DataFrame({**columns, "fold": self.folds, **scores})


def _read_labels(labels: Iterable[Any], count: int) -> tuple[tuple[Any, Any], Any]:
    """Returns the negative and the positive label, and which texts have the positive one."""
    items = _plain_items(labels, "labels", count)
    counts = Counter(items)
    if len(counts) != 2:
        words = ", ".join(f"{label!r} ({number})" for label, number in counts.most_common(5))
        raise BadHook(
            f"the labels have {count_of(len(counts), 'value')}, {words}, and a probe tells two "
            "apart: keep the texts of two labels, or compare with one (label == 'spam')"
        )
    try:
        negative, positive = sorted(counts)
    except TypeError:
        names = " and ".join(map(repr, counts))
        raise BadHook(f"the labels are {names}, which have no order: give two of a kind") from None
    return (negative, positive), np.array([item == positive for item in items])


def _read_groups(groups: Iterable[Any] | None, rows: Sequence[Row]) -> Int[np.ndarray, " text"]:
    """Returns the number of each text's group. Without groups, equal texts are one."""
    items = list(map(tuple, rows))
    if groups is not None:
        items = _plain_items(groups, "groups", len(rows))
    number_of_group: dict[Any, int] = {}
    numbers = [number_of_group.setdefault(item, len(number_of_group)) for item in items]
    return np.array(numbers)


def _plain_items(values: Any, name: str, count: int) -> list[Any]:
    """Returns labels or groups as Python's own values, one for each text."""
    values = values.tolist() if hasattr(values, "tolist") else as_items(values)
    if values is None:
        raise BadHook(f"{name}={describe(values)}: give a value for each text")
    if len(values) != count:
        raise BadHook(
            f"there are {count_of(count, 'text')} and {len(values)} {name}: give one for each text"
        )
    items = [value.item() if hasattr(value, "item") else value for value in values]
    _check_items(items, name)
    return items


def _check_items(items: Sequence[Any], name: str) -> None:
    try:
        missing = [item for item in items if item is None or item != item]
        set(items)
    except TypeError as error:
        raise BadHook(f"{name} has a value that is no number or text: {error}") from error
    if missing:
        raise BadHook(f"{name} has {len(missing)} missing values (None or NaN): leave them out")


# ---- fits


def _held_out(
    model: Any,
    features: Any,
    is_positive: Bool[np.ndarray, " text"],
    folds: Int[np.ndarray, " text"],
) -> Float[np.ndarray, " text"]:
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    split, method = PredefinedSplit(folds), "decision_function"
    return np.asarray(cross_val_predict(model, features, is_positive, cv=split, method=method))


def _linear_model(c: float) -> Any:
    """Returns an unfitted logistic regression on standardised values."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_STEPS))


def _text_model() -> Any:
    """Returns an unfitted logistic regression on the columns of `_text_features`."""
    from sklearn.compose import make_column_transformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    analyzer: Any = _unchanged
    bag = TfidfVectorizer(analyzer=analyzer, sublinear_tf=True)
    lengths = (StandardScaler(), ["tokens", "characters"])
    return make_pipeline(
        make_column_transformer((bag, "words"), lengths), LogisticRegression(max_iter=MAX_STEPS)
    )


def _unchanged(words: list[str]) -> list[str]:
    return words


def _text_features(lm: LM, rows: Sequence[Row]) -> pd.DataFrame:
    """Returns each text's words in lower case (its token ids without a tokenizer), and the
    logarithms of its numbers of tokens and characters.
    """
    words, characters = [list(map(str, row)) for row in rows], [1] * len(rows)
    if lm.tokenizer is not None:
        texts = [prompt_text(lm, row).lower() for row in rows]
        words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
        characters = [1 + len(text) for text in texts]
    tokens = list(map(len, rows))
    lengths = {"tokens": np.log(tokens), "characters": np.log(characters)}
    return pd.DataFrame({"words": words, **lengths})


def _statistics_by_length(
    lm: LM, rows: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int
) -> dict[AnySite, SiteStatistics]:
    """Returns the statistics of each site. Texts of similar length run together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    statistics = collect_statistics(lm, [rows[index] for index in order], sites, pos, batch)
    inverse_order = torch.tensor(order).argsort()
    result = {}
    for site, of_site in statistics.items():
        if not bool(of_site.means.isfinite().all()):
            raise BadPrompt(f"the values at {site} are not all finite numbers: no probe fits them")
        means, counts = of_site.means[inverse_order], of_site.counts[inverse_order]
        result[site] = SiteStatistics(means, counts, of_site.lengths)
    return result


def _as_probe(model: Any, site: AnySite, norm: float, about: dict[str, Any]) -> Probe:
    """Returns the fitted model as a probe, whose direction includes the standardisation."""
    scaler, regression = model.named_steps.values()
    direction = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - scaler.mean_ @ direction)
    return Probe(site, Constant(torch.tensor(direction)), bias, norm, about)


def _origin(lm: LM, pos: PosLike, rows: Sequence[Row], study: Study) -> dict[str, Any]:
    """Returns how the probes are fitted, for their `about`."""
    positive = list(itertools.compress(rows, study.is_positive))
    negative = list(itertools.compress(rows, ~study.is_positive))
    origin = provenance(lm, "probe (logistic regression)", pos, positive, negative)
    return {**origin, "labels": list(study.labels)}


# ---- the table


def _line(area: Auroc, baseline: Auroc, shuffled: list[float]) -> dict[str, float]:
    low, high = auroc_difference(area, baseline)
    line = {"auroc": area.value, "auroc_low": area.low, "auroc_high": area.high}
    line |= {"text_only": baseline.value, "above_text": area.value - baseline.value}
    line |= {"above_text_low": low, "above_text_high": high}
    if shuffled:
        draws = further_draws(np.array(shuffled)[:, None], CONFIDENCE)
        line |= {"shuffled": float(draws.mean[0]), "shuffled_low": float(draws.low[0])}
        line |= {"shuffled_high": float(draws.high[0])}
    return line | {"text_only_low": baseline.low, "text_only_high": baseline.high}


def _rounded(line: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in line.items()}
