"""What a notebook shows and completes: small, escaped, by itself; and the tour, cell by cell."""

import copy
import html
import io
import json
import re
import subprocess
import sys
import types
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import tokenizer
from dictionaries import random_weights, write
from nbclient import NotebookClient
from pages import ROOT

import hookkit as hk
from hookkit.display import MAX_CHARACTERS, MAX_ROWS, first_rows, format_value, render_html
from hookkit.errors import MissingExtra, NotCaptured, OutOfRange, UnknownKeyword

NASTY = ["<script>alert(1)</script>", "\n\t", " שלום", '"><img src=x onerror=y>', "$x$"]
TOUR = ROOT / "experiments" / "tour.py"
ALLOWED = {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "pre"}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Tags:
    found = Tags()
    found.feed(html)
    return found


@pytest.fixture(scope="module")
def nasty():
    words = tokenizer()
    words.add_tokens(NASTY)
    return hk.LM(hk.tiny("llama", config={"vocab_size": len(words)}).model, words, NASTY[0])


def things(lm):
    ids = [lm.tokenizer.convert_tokens_to_ids(word) for word in NASTY]
    hooks = [
        hk.boost(*ids, by=1.0),
        hk.steer("resid_post.1", torch.ones(32), pos=-1),
        hk.capture(["z", "embed"]),
    ]
    run = hk.forward(lm, [ids, [5, 6]], *hooks)
    yield lm
    yield from (
        lm.sites,
        lm.sites("z"),
        hk.Site("z", 1, 2),
        *hooks,
        run,
        run.captured("z.1"),
        hk.trace(watch=ids),
    )
    yield hk.compare_generations(lm, [ids], hk.ban(ids[0]), max_new_tokens=2, do_sample=False)
    metric = hk.metrics.logit_diff(ids[0], ids[1])
    yield hk.gradients(lm, [ids], metric, "embed")
    edges = hk.edge_attribution(lm, [ids], [ids[::-1]], metric)
    yield hk.circuit(edges, share=1.0)
    yield hk.faithfulness(lm, [ids], [ids[::-1]], edges, metric, sizes=[1.0], draws=0)
    yield hk.sweep_plan(lm, [ids], {"layer": range(3)}, lambda layer: hk.skip_block(layer), metric)
    yield hk.stats.activation_statistics(lm, [ids], "z.1", progress=False)
    vectors = hk.mean_difference(lm, [ids], [[5, 6]], "resid_post.1")
    sites = lm.describe().assign(blocks=3, proved=True)
    yield from (
        vectors,
        vectors[0],
        hk.types.Checkup(sites, sites, {"model": NASTY[0]}, [], [NASTY[3]]),
    )
    yield hk.report(NASTY[0], hk.ranks(run))
    yield hk.types.Pairs(NASTY[0], (tuple(ids),), (tuple(ids),), (ids[0],), (ids[1],))
    yield hk.model_diff(
        lm, hk.tiny("llama", seed=1, tokenizer=lm.tokenizer, config={"vocab_size": 325}), [ids]
    )


def test_everything_that_a_notebook_shows_is_small_and_escaped(nasty):
    said = {}
    for thing in things(nasty):
        html = thing._repr_html_()
        found = read(html)
        assert found.tags <= ALLOWED and found.names <= {"style", "class"}, type(thing)
        assert len(html) < 20_000 and "http" not in html and "background:#" not in html, type(thing)
        assert "mathjax_ignore" in html
        said[type(thing).__name__] = found.text
    assert len(said) >= 17
    assert (
        NASTY[0] in said["LM"] and repr(NASTY[1])[1:-1] in said["Run"] and "\t" not in said["Run"]
    )
    assert (
        "resid_post" in said["SiteNames"]
        and "resid_post.1" in said["Vector"]
        and "cells" in said["Plan"]
    )


def test_a_long_table_says_how_much_more_there_is(nasty):
    rows = [{"n": n} for n in range(40)]
    assert f"and {40 - MAX_ROWS} more" in render_html("t", rows=rows)
    table = hk.ranks(hk.forward(nasty, [[5]]), top=30)
    assert len(first_rows(table)) == 30 and list(first_rows(table, "rank")[0]) == ["rank"]
    assert (
        len(format_value("x" * 999)) == MAX_CHARACTERS
        and format_value(float("nan")) == ""
        and format_value(0.123456) == "0.1235"
    )


def test_sites_are_completed_where_names_are_given(llama):
    run = hk.forward(llama, "Tea", hk.capture(["resid_post", "z.1"]))
    assert run._ipython_key_completions_() == [
        "resid_post.0",
        "resid_post.1",
        "resid_post.2",
        "z.1",
    ]
    assert run.captures._ipython_key_completions_() == run._ipython_key_completions_()
    assert {"resid_post", "z", "embed", "logits"} <= set(dir(llama.sites))
    assert {"resid_post", "resid_post.2", "z.0"} <= set(llama.sites._ipython_key_completions_())
    assert llama.sites.resid_post == llama.sites("resid_post") == llama.sites["resid_post"]
    assert llama.sites.z[1] == hk.Site("z", 1)
    assert not hasattr(llama.sites, "_repr_png_") and not hasattr(llama.sites, "pos_embed")
    with pytest.raises(AttributeError, match="did you mean 'resid_post'"):
        _ = llama.sites.resid_pots
    with pytest.raises(UnknownKeyword, match="has no keyword 'layer'; did you mean 'layers'"):
        llama.sites("z", layer=3)


def test_progress_is_shown_by_what_suits_a_notebook():
    package = Path(hk.__file__).parent
    found = [
        line
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "import tqdm" in line
    ]
    assert len(found) > 4 and {line.strip() for line in found} == {"from tqdm.auto import tqdm"}


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> nbformat.NotebookNode:
    """The tour as a notebook, as `make docs` writes it."""
    path = tmp_path_factory.mktemp("tour") / "tour.ipynb"
    words = [sys.executable, "-m", "hookkit.docs.notebook", str(TOUR), str(path)]
    subprocess.run(words, check=True)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def checked(said: str) -> None:
    assert "' coffee'" in said and " 8827 " in said
    assert "62 parts, together 6.12" in said
    assert "{0.3: [' a great" in said and "-0.3: [' a complete waste" in said


def test_the_tour_runs_cell_by_cell_and_finds_what_its_sentences_say(tour, smol, monkeypatch):
    monkeypatch.setattr(hk, "load", lambda **_: smol)
    session: dict = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for cell in tour.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, str(TOUR), "exec"), session)
    checked(printed.getvalue())
    assert session["paris"]["last_prob"].iloc[0] > 0.5
    strongest = session["strongest"]
    assert strongest["logit_diff_effect"].min() > 0.9 and strongest["pos"].iloc[-1] == 13


def test_the_tour_in_a_fresh_kernel_shows_every_figure(tour):
    notebook = NotebookClient(copy.deepcopy(tour), timeout=300, kernel_name="python3").execute()
    said = ""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        shown = [output.get("data", {}) for output in cell.outputs]
        pictures = [data for data in shown if "image/png" in data]
        tables = [re.sub("<[^>]*>", " ", data.get("text/html", "")) for data in shown]
        said += html.unescape(" ".join(tables))
        said += "".join(output.get("text", "") for output in cell.outputs)
        assert len(pictures) == cell.source.count("hk.figures."), cell.source
    checked(said)
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 6


def drawing(monkeypatch):
    """circuitsvis as it is called: what it would write, with tokens in a script."""
    calls = []

    def attention_heads(**given):
        calls.append(given)
        props = json.dumps({"tokens": given["tokens"]})
        return types.SimpleNamespace(
            local_src=f"<script>local({props})</script>", cdn_src=f"<script>cdn({props})</script>"
        )

    module = types.ModuleType("circuitsvis.attention")
    module.attention_heads = attention_heads
    monkeypatch.setitem(sys.modules, "circuitsvis", types.ModuleType("circuitsvis"))
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", module)
    return calls


def test_attention_is_drawn_of_one_prompt_with_its_tokens_escaped(nasty, monkeypatch):
    calls = drawing(monkeypatch)
    ids = [nasty.tokenizer.convert_tokens_to_ids(word) for word in NASTY]
    run = hk.forward(nasty, [[5, 6], ids], hk.capture("pattern.1"))
    view = hk.figures.attention_view(run, 1, row=1, heads=[0, 3])
    assert calls[0]["attention_head_names"] == ["1.0", "1.3"]
    assert torch.equal(calls[0]["attention"], run["pattern.1"][1][[0, 3]]) and calls[0][
        "attention"
    ].shape == (2, 5, 5)
    html = view._repr_html_()
    assert (
        html.count("<script>") == 1
        and html.count("</script>") == 1
        and "\\u003cscript\\u003e" in html
    )
    told = json.loads(re.search(r"local\((.*)\)</script>", html).group(1))
    assert told["tokens"] == [nasty.string(i) for i in ids] and "pattern.1 of" in repr(view)
    assert "cdn(" in hk.figures.attention_view(run, 1, cdn=True).html
    assert calls[-1]["attention"].shape == (4, 2, 2)
    for wrong, error in (({"row": 7}, OutOfRange), ({"heads": [9]}, OutOfRange)):
        with pytest.raises(error, match="was asked for"):
            hk.figures.attention_view(run, 1, **wrong)
    last = hk.forward(nasty, [[5, 6]], hk.capture("pattern.1", pos=-1))
    with pytest.raises(NotCaptured, match="at some positions only"):
        hk.figures.attention_view(last, 1)


def test_without_circuitsvis_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    run = hk.forward(llama, "Tea", hk.capture("pattern.1"))
    with pytest.raises(MissingExtra, match=r"pip install 'hookkit\[notebook\]'"):
        hk.figures.attention_view(run, 1)


def test_with_circuitsvis_the_view_needs_no_network(llama):
    pytest.importorskip("circuitsvis")
    run = hk.forward(llama, "Tea", hk.capture("pattern.1"))
    html = hk.figures.attention_view(run, 1).html
    assert "unpkg" not in html and '"1.0"' in html and len(html) > 10**6
    assert "unpkg.com/circuitsvis" in hk.figures.attention_view(run, 1, cdn=True).html


MANY = 300


def outcomes(lm, folder):
    """An object of every class of hk.types, most of them large, by the name of its class."""
    prompts = [[5 + n % 200, 6, 7] for n in range(MANY)]
    metric, long_text = hk.metrics.logit_diff(5, 6), "word " * 2000
    run = hk.forward(lm, prompts, hk.capture(["z", "embed"]), hk.steer("embed", torch.ones(32)))
    yield "Run", run
    yield "Captured", run.captured("z.1")
    yield "Sites", lm.sites()
    yield "ModuleSite", hk.module("model.layers.1.mlp.gate_proj", side="output")
    yield "ModuleLocation", lm.family.locations[hk.Site("z").name]
    yield "Hook", hk.steer("resid_post.1", torch.ones(MANY, 3, 32))
    yield "Condition", hk.when.entropy_above(2.0)
    yield "Metric", hk.metrics.prob(list(range(MANY)))
    yield "Trace", hk.trace(watch=range(MANY))
    yield "MetricInput", hk.types.MetricInput(run.logits[:, -1], range(MANY), run.logits[:, -1])
    pair = (lm, prompts[:2], [row[::-1] for row in prompts[:2]])
    scores = hk.edge_attribution(*pair, metric)
    yield "Faithfulness", hk.faithfulness(*pair, scores, metric, draws=1)
    yield "Gradients", hk.gradients(lm, prompts, metric, ["embed", "resid_post.1"])
    yield "Pairs", hk.types.Pairs(long_text, *[[[5] * MANY] * MANY] * 2, [5] * MANY, [6] * MANY)
    yield "Plan", hk.sweep_plan(lm, prompts, {"layer": range(3)}, hk.skip_block, metric)
    yield "Comparison", hk.compare_generations(lm, prompts[:50], hk.ban(7), max_new_tokens=2)
    yield "Stream", hk.stream(lm, prompts[:2], max_new_tokens=2)
    yield "TokenShifts", hk.token_shifts(lm, prompts[:4], hk.ban(7), controls=2, progress=False)
    yield "Statistics", hk.stats.activation_statistics(lm, prompts[:4], "z", progress=False)
    yield "Vectors", hk.mean_difference(lm, prompts[:2], prompts[2:4], "resid_post")
    yield "Harvest", hk.harvest(lm, prompts[:4], "embed", folder / "harvest", progress=False)
    yield (
        "TunedLens",
        hk.types.TunedLens(
            {f"resid_post.{n}": torch.eye(32) for n in range(MANY)}, {}, hk.ranks(run)
        ),
    )
    sums = {f"resid_post.{n}": torch.ones(2, 4, 32) for n in range(MANY)}
    about = {"texts": long_text}
    yield "JacobianLens", hk.types.JacobianLens(sums, (MANY, MANY), {}, (1, 2, 3, 4), about=about)
    yield "Scan", hk.scan(lm, prompts)
    yield "Report", hk.report(long_text, *[hk.ranks(run)] * MANY)
    yield "Difference", hk.model_diff(lm, lm, prompts[:20], hooks_after=hk.ban(7))
    sites = lm.describe().assign(blocks=3, proved=True)
    yield "Checkup", hk.types.Checkup(sites, sites, {"model": long_text}, [], [long_text] * MANY)
    with hk.record(folder / "record", title="Tea") as record:
        yield "Record", record
    with hk.attach(lm, hk.capture("z")) as manager:
        lm.model(torch.tensor([[5, 6, 7]]))
        yield "HookManager", manager
    contexts = []

    def keep(values, context):
        contexts.append(context)
        return values

    hk.forward(lm, prompts, hk.edit("z.1", keep))
    yield "EditContext", contexts[0]
    yield "Chat", hk.chat(user=long_text, system=long_text)
    labels = [number < MANY // 2 for number in range(MANY)]
    probes = hk.fit_probe(lm, prompts, labels, ["resid_post.0", "resid_post.1"], shuffles=2)
    yield "Probes", probes
    yield "Probe", probes.best
    yield "OV", hk.ov(lm, 0, 1)
    yield "QK", hk.qk(lm, 0, 1)
    pairs = [(prompts[n], prompts[-n], n % 9) for n in range(MANY)]
    fit = hk.fit_subspace(lm, pairs, "resid_post.0", 2, epochs=1, controls=[])
    yield "SubspaceFit", fit
    yield "Subspace", fit.subspace
    weights = random_weights("standard", n=MANY)
    kinds = ["token"] * MANY + ["logit"]
    nodes = pd.DataFrame({"kind": kinds, "site": long_text, "pos": 0, "token": long_text})
    nodes = nodes.assign(value=0.5, influence=0.1)
    about = {"prompt": long_text, "model": long_text}
    edges = torch.ones(MANY + 1, MANY + 1)
    yield "Graph", hk.types.Graph(nodes, edges, (long_text,) * MANY, about)
    dictionary = hk.load_dictionary(write(folder / "sae", "standard", weights))
    yield "Dictionary", dictionary
    own = lm.with_dictionaries(dictionary, check=False)
    yield "FeatureReport", hk.feature(own, prompts[:4], "feat.resid_post.1", progress=False)


def test_the_repr_of_an_outcome_says_what_it_holds_in_a_few_lines(llama, tmp_path):
    seen = set()
    for name, outcome in outcomes(llama, tmp_path):
        text = repr(outcome)
        assert isinstance(outcome, getattr(hk.types, name)), name
        assert len(text) <= 1500 and len(text.splitlines()) <= 15, (name, text[:3000])
        assert "tensor(" not in text and "DataFrame" not in text and " object at 0x" not in text, (
            text
        )
        seen.add(name)
    assert seen == set(hk.types.__all__)
