"""`hk.feature`: a page about features of a dictionary: when they are active, and what they do.

    report = hk.feature(lm, "texts.txt", "feat.resid_post.12.1234")
    hk.show(report.summary)
    report.write("feature_1234")

All features are read in one harvest of the texts, without a forward for each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch

from ..arguments import check_arguments, check_integer
from ..data.harvest.folder import describe_model
from ..data.harvest.harvest import Harvest
from ..data.harvest.texts import TextsLike
from ..data.harvest.writing import harvest as harvest_texts
from ..display import count_of, describe_outcome, first_rows, render_html
from ..errors import BadHook, OtherModel, Unsupported
from ..features.clamping import Context, clamp_effects
from ..features.corpus import BEFORE, BINS, NO_TOKEN, FeatureCorpus, read_corpus
from ..features.decoder import nearest_features, promoted_tokens
from ..features.dictionary import Dictionary
from ..figures.reports import activation_histogram
from ..models.dictionaries import find_dictionary
from ..models.lm import LM
from ..models.positions import PosLike, Where, read_position
from ..models.sites import Site, SitesLike
from ..tables.distributions import token_texts
from .page import Report, report
from .parts import Content, Part, Passage, Passages

MAX_FEATURES = 10  # that have a part of their own on the page; the tables have all features
CONTEXTS = 4  # in which a feature is clamped
NEAREST = 5
WORDS = 5  # promoted tokens in the summary
CorpusLike: TypeAlias = Harvest | TextsLike


@dataclass(frozen=True, eq=False)
class FeatureReport:
    """What some features of a dictionary do. Made by `feature`.

    site      all features of the dictionary
    n_tokens  the number of tokens of the corpus that were read
    tables    by name: summary (one row for each feature), histogram, examples, logits, nearest,
              effects
    missing   why a table cannot be had of this model, by the name of the table
    passages  the example texts of the first features, with the activation at each token
    """

    site: Site
    n_tokens: int
    tables: Mapping[str, pd.DataFrame]
    missing: Mapping[str, str]
    passages: Mapping[int, Sequence[Passages]]

    @property
    def summary(self) -> pd.DataFrame:
        """One row for each feature: see `feature`."""
        return self.tables["summary"]

    def page(self, title: str = "") -> Report:
        """Returns a page with a part for each of the first 10 features."""
        numbers = self.summary["feature"].tolist()
        subject = f"Features of {self.site}"
        if len(numbers) == 1:
            subject = f"Feature {self.site}.{numbers[0]}"
        parts: list[Content] = [Part(self.summary, "summary", "One row for each feature.")]
        for number in numbers[:MAX_FEATURES]:
            parts += self._write_feature(number)
        if self.missing:
            reasons = map("{}: {}".format, self.missing, self.missing.values())
            parts += ["# What is not available for this dictionary", "\n".join(reasons)]
        page = report(title or subject, *parts)
        data = []
        for name, table in self.tables.items():
            if name != "summary":
                data.append(Part(table, name, f"{name}, for all features"))
        return replace(page, data=tuple(data))

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the page, its figures and all tables to a folder. Returns the page's path."""
        return self.page().write(folder)

    def _of(self, name: str, number: int) -> Any:
        """Returns the rows of a table that are about one feature, without its number."""
        if name not in self.tables:
            return pd.DataFrame()
        table: Any = self.tables[name]
        return table[table["feature"] == number].drop(columns="feature").reset_index(drop=True)

    def _write_feature(self, number: int) -> Iterator[Content]:
        facts = self._of("summary", number).iloc[0]
        yield f"# {self.site}.{number}"
        if facts["density"]:
            yield (
                f"It is active at {facts['density']:.3%} of {self.n_tokens:,} tokens; where it is "
                f"active it is {facts['mean']:.3g} on average, and {facts['max']:.3g} at most."
            )
            histogram = activation_histogram(self._of("histogram", number))
            yield Part(histogram, f"histogram_{number}")
        else:
            yield f"It is active at none of {self.n_tokens:,} tokens."
        yield from self.passages.get(number, ())
        logits = self._of("logits", number)
        if len(logits):
            caption = "The tokens that it promotes and demotes most, directly."
            yield Part(_side_by_side(logits), f"logits_{number}", caption, file="logits")
        caption = "The features whose decoder rows have the largest cosines with its own."
        yield Part(self._of("nearest", number), f"nearest_{number}", caption, file="nearest")
        effects = self._of("effects", number)
        if len(effects):
            yield _describe_effects(effects)
            columns: Any = effects[["edit", "read", "came", "activation", "loss_delta", "token",
                                    "rank_before", "rank_after", "rank_delta", "kl",
                                    "control_kl", "control_kl_max"]]  # fmt: skip
            caption = (
                "The feature is clamped at the token that was read. control: 8 random features "
                "that add a vector of the same length (mean and largest). KL in nats."
            )
            yield Part(columns, f"effects_{number}", caption, file="effects")

    def __repr__(self) -> str:
        count = count_of(len(self.summary), "feature")
        lines = [f"FeatureReport({count} of {self.site}, {self.n_tokens:,} tokens)"]
        for row in self.summary.head(3).to_dict("records"):
            words = f"  {self.site}.{row['feature']}: active at {row['density']:.3%}"
            if "promoted" in row:
                words += f", promotes {row['promoted'][:80]}"
            lines.append(words)
        calls = ("hk.show(report.summary)", "report.tables[name]", "report.write(folder)")
        return describe_outcome("\n".join(lines), *calls)

    def _repr_html_(self) -> str:
        facts = {"tables": ", ".join(self.tables), "page": "report.write(folder)"}
        title = f"{count_of(len(self.summary), 'feature')} of {self.site}"
        return render_html(title, {**facts, **self.missing}, first_rows(self.summary))


def _side_by_side(logits: Any) -> pd.DataFrame:
    """Returns promoted and demoted tokens in one row for each place in the order."""
    halves = []
    for kind in ("promoted", "demoted"):
        half = logits[logits["kind"] == kind].set_index("order")[["token", "logit"]]
        # tokens in quotes, since the column's name is none of the tokens' names
        half = half.assign(token=list(map(repr, half["token"])))
        halves.append(half.rename(columns={"token": kind, "logit": f"{kind}_logit"}))
    return pd.concat(halves, axis=1).reset_index(drop=True)


def _describe_effects(effects: Any) -> str:
    sentences = []
    for name, part in effects.groupby("edit", sort=False):
        sentences.append(
            f"Clamped {name}, it changes the next token's distribution by {part['kl'].mean():.3g} "
            f"nats (KL, mean over {count_of(len(part), 'text')}), and the loss of the token that "
            f"came by {part['loss_delta'].mean():+.3g}; random features of equal length change "
            f"them by {part['control_kl'].mean():.3g} and "
            f"{part['control_loss_delta'].mean():+.3g}."
        )
    return "\n".join(sentences)


@check_arguments
def feature(
    lm: LM,
    texts: CorpusLike,
    sites: SitesLike,
    *,
    pos: PosLike = slice(1, None),
    top: int = 10,
    effects: int = MAX_FEATURES,
    seed: int = 0,
    progress: bool = True,
) -> FeatureReport:
    """Returns what features of a dictionary do: when they are active, and what they change.

    `sites` are features such as "feat.resid_post.12.1234", a list of them, or all of a dictionary,
    "feat.resid_post.12". `texts` are a corpus as for `harvest`, which is then harvested to a
    temporary folder (texts longer than the model's context in pieces), or a harvest of all features
    of the dictionary. The result has tables of all features, and writes a page with a part for each
    of the first 10.

    `summary` has one row for each feature: feature, density (the share of tokens at which it is
    active), mean (where it is active), max, promoted and demoted (tokens, from its decoder row
    through the model's own end), nearest and nearest_cosine. `pos` are the positions that count: by
    default all but the first, which is often an outlier. `examples` has the `top` texts at which it
    is largest, and tokens at quantiles of its activations; `logits` the `top` tokens that it
    promotes and demotes. `effects` has what clamping does, for the first `effects` features: each
    is set to 0, and to twice its maximum, at a token of its own top texts, beside random features
    that add a vector of the same length, drawn with `seed`.

    >>> lm = lm.with_dictionaries(dictionary)
    >>> texts = ["I like oat milk in my coffee."]
    >>> found = feature(lm, texts, "feat.resid_post.12.7", progress=False)
    >>> found.summary["feature"].tolist(), len(found.tables["histogram"])
    ([7], 20)
    """
    check_integer(top, "top", least=1, meaning="how many texts and tokens of a feature to keep,")
    check_integer(effects, "effects", least=0, meaning="for how many features to measure effects,")
    where = Where(read_position(pos))
    lm.refuse_engine("a page about features edits each row with a vector of its own")
    site, dictionary, numbers = _features_of(lm, sites)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(texts, Harvest):
            harvest = texts
            _check_harvest(lm, harvest, site)
        else:
            harvest = harvest_texts(
                lm, texts, site, Path(folder) / "harvest", long="split", progress=progress
            )
        corpus = read_corpus(harvest, site, numbers, where, top)
        contexts = _contexts(harvest, corpus, numbers[:effects])
        harvest.shards.close_before(len(harvest) + 1)
    tables: dict[str, pd.DataFrame] = {"histogram": _histogram_table(corpus, numbers)}
    tables["examples"] = _examples_table(lm, corpus)
    missing: dict[str, str] = {}
    try:
        tables["logits"] = promoted_tokens(lm, dictionary, numbers, top)
    except Unsupported as error:
        missing["logits"] = str(error)
    tables["nearest"] = nearest_features(dictionary, numbers, NEAREST)
    parts: list[pd.DataFrame] = []
    for slot, (number, texts_of_feature) in enumerate(contexts.items()):
        if texts_of_feature:
            one, peak = replace(site, head=number), float(corpus.maxima[slot])
            watch = _first_promoted(tables, number)
            parts.append(
                clamp_effects(lm, dictionary, one, texts_of_feature, peak, watch=watch, seed=seed)
            )
    if parts:
        tables["effects"] = pd.concat(parts, ignore_index=True)
    tables = {"summary": _summary(corpus, numbers, tables), **tables}
    passages = {}
    for slot, number in enumerate(numbers[:MAX_FEATURES]):
        passages[number] = _passages(lm, corpus, number, float(corpus.maxima[slot]))
    return FeatureReport(site, corpus.n_tokens, tables, missing, passages)


# ---- what is asked for


def _features_of(lm: LM, sites: SitesLike) -> tuple[Site, Dictionary, list[int]]:
    """Returns the site of all features, its dictionary, and the numbers of the features."""
    numbers: dict[int, None] = {}
    owners: dict[Site, None] = {}
    for site in lm.expand(sites):
        if not isinstance(site, Site) or not site.of_features:
            raise BadHook(
                f"{site} is no feature: give features of a dictionary, 'feat.resid_post.12.7' or "
                "'feat.resid_post.12', of lm.with_dictionaries(…)"
            )
        owner = replace(site, head=None)
        owners[owner] = None
        if site.head is None:
            every_feature = range(find_dictionary(lm.layout.dictionaries, owner).n_features)
            numbers |= dict.fromkeys(every_feature)
        else:
            numbers[site.head] = None
    if len(owners) > 1:
        raise BadHook(
            f"features of {', '.join(map(str, owners))} were asked for: give those of one "
            "dictionary at a time"
        )
    owner = next(iter(owners))
    dictionary: Any = find_dictionary(lm.layout.dictionaries, owner)
    if not isinstance(dictionary, Dictionary):
        raise Unsupported(f"the dictionary of {owner} is of another kind than hk.load_dictionary's")
    return owner, dictionary, list(numbers)


def _check_harvest(lm: LM, harvest: Harvest, site: Site) -> None:
    """Raises `OtherModel` for a harvest of another model or dictionary."""
    harvest[site]  # raises `NotCaptured`
    dictionary = find_dictionary(lm.layout.dictionaries, site)
    harvested, present = harvest.about["model"], describe_model(lm)
    names = [
        name
        for name in present
        if name.endswith("_sha256") and harvested.get(name) != present[name]
    ]
    about_dictionary = harvested.get("dictionaries", {}).get(str(site), {})
    if about_dictionary.get("sha256") != dictionary.about()["sha256"]:
        names.append("dictionary")
    if names:
        raise OtherModel(
            f"the harvest in {harvest.shards.folder.name!r} was made with another "
            f"{', '.join(names)} than this LM has: give the LM that it was made with, or texts"
        )


def _contexts(
    harvest: Harvest, corpus: FeatureCorpus, features: Sequence[int]
) -> dict[int, list[Context]]:
    """Returns the top texts of some features, up to the token at which each is largest."""
    contexts: dict[int, list[Context]] = {number: [] for number in features}
    examples: Any = corpus.examples
    is_needed = (examples["kind"] == "top") & examples["feature"].isin(features)
    for example in examples[is_needed].to_dict("records"):
        ids, pos = harvest.tokens(example["row"]), example["pos"]
        contexts_of_feature = contexts[example["feature"]]
        if pos + 1 < len(ids) and len(contexts_of_feature) < CONTEXTS:
            contexts_of_feature.append(Context(ids[: pos + 1], ids[pos + 1], example["text"]))
    return contexts


# ---- tables


def _histogram_table(corpus: FeatureCorpus, numbers: Sequence[int]) -> pd.DataFrame:
    """Columns: feature, low, high, count. A feature that is never active has zeros."""
    edges = torch.linspace(0, 1, BINS + 1) * corpus.maxima[:, None]
    columns = {
        "feature": torch.tensor(numbers).repeat_interleave(BINS),
        "low": edges[:, :-1].flatten(),
        "high": edges[:, 1:].flatten(),
        "count": corpus.histogram.flatten(),
    }
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def _examples_table(lm: LM, corpus: FeatureCorpus) -> pd.DataFrame:
    """Columns: feature, kind, activation, row, text, piece, pos, token, token_id, context."""
    table: Any = corpus.examples.copy()
    table["token"] = token_texts(lm, table["token_id"].tolist())
    ids = corpus.tokens.unique().tolist()
    text_of_token = {token: lm.string(token) for token in ids if token != NO_TOKEN}
    text_of_token[NO_TOKEN] = ""
    contexts = []
    for window in corpus.tokens.tolist():
        contexts.append("".join(map(text_of_token.__getitem__, window)))
    table["context"] = contexts
    names = [
        "feature",
        "kind",
        "activation",
        "row",
        "text",
        "piece",
        "pos",
        "token",
        "token_id",
        "context",
    ]
    return table[names]


def _first_promoted(tables: Mapping[str, pd.DataFrame], number: int) -> int | None:
    if "logits" not in tables:
        return None
    table: Any = tables["logits"]
    return int(table[table["feature"] == number]["token_id"].iloc[0])


def _summary(
    corpus: FeatureCorpus, numbers: Sequence[int], tables: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    table = pd.DataFrame({"feature": numbers})
    table["density"] = (corpus.counts / corpus.n_tokens).tolist()
    table["mean"] = (corpus.sums / corpus.counts).tolist()
    table["max"] = corpus.maxima.tolist()
    if "logits" in tables:
        logits: Any = tables["logits"]
        logits = logits[logits["order"] <= WORDS]
        for kind in ("promoted", "demoted"):
            quoted = logits[logits["kind"] == kind].assign(token=logits["token"].map(repr))
            words = quoted.groupby("feature")["token"].agg(" ".join)
            table[kind] = table["feature"].map(words)
    nearest: Any = tables["nearest"]
    nearest = nearest[nearest["order"] == 1].set_index("feature")
    table["nearest"] = table["feature"].map(nearest["nearest"])
    table["nearest_cosine"] = table["feature"].map(nearest["cosine"])
    return table


def _passages(lm: LM, corpus: FeatureCorpus, number: int, maximum: float) -> list[Passages]:
    """Returns the example texts of a feature: the top ones, and those at quantiles."""
    examples: Any = corpus.examples
    captions = {
        True: "The texts at which it is largest. Colours are activations.",
        False: "Tokens at quantiles of its activations, where it is active.",
    }
    result = []
    for is_top, caption in captions.items():
        is_part = (examples["kind"] == "top") == is_top
        part = examples[is_part & (examples["feature"] == number)]
        passages = []
        for index, example in part.iterrows():
            ids, values = corpus.tokens[index], corpus.activations[index]
            is_token = ids != NO_TOKEN
            shares = (values[is_token] / maximum).clamp(min=0).tolist()
            words = token_texts(lm, ids[is_token].tolist())
            tokens = tuple(zip(words, shares, strict=True))
            focus = int(is_token[:BEFORE].sum())
            label = f"{example['activation']:.3g}"
            if not is_top:
                label += f" ({example['kind']})"
            passages.append(Passage(label, tokens, focus))
        if passages:
            result.append(Passages(caption, tuple(passages)))
    return result
