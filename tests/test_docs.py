"""Every example in a docstring runs, on the default model, and gives what stands there."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shown import Checker
from test_house import MODULES

import hookkit as hk
from hookkit.errors import HookkitError

FINDER = doctest.DocTestFinder(exclude_empty=True)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples() -> list[doctest.DocTest]:
    found = [test for name in MODULES for test in FINDER.find(importlib.import_module(name))]
    return [test for test in {test.name: test for test in found}.values() if test.examples]


CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


def swept(lm: hk.LM):
    """What a sweep gives."""
    return hk.ablations(
        lm,
        ["I like oat milk in my", "She takes tea with"],
        "attn_out",
        hk.metrics.prob(" coffee"),
        layers=[3, 9],
    )


@pytest.fixture(scope="module")
def words(smol):
    """What an example may take as given."""
    torch.manual_seed(0)
    lm = smol
    given = {name: getattr(hk, name) for name in hk.__all__}
    for module in (hk.metrics, hk.stats, hk.results, hk.when, hk.figures):
        given |= {name: getattr(module, name) for name in dir(module)}
    run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
    other = hk.forward(lm, "She takes green tea with", hk.capture("resid_post.6"))
    inputs = lm.tokenizer("I like oat milk in my", return_tensors="pt")
    return given | {"hk": hk, "torch": torch, "lm": lm, "run": run, "other": other, "inputs": inputs,
                    "prompt": "I like oat milk in my", "clean": CLEAN, "corrupted": CORRUPTED, "table": swept(lm),
                    "vector": torch.randn(576), "direction": torch.randn(576)}  # fmt: skip


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_an_example_gives_what_it_says(test, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test.globs = test.globs | words
    said: list[str] = []
    doctest.DocTestRunner(Checker(), optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


def public() -> list[str]:
    return [name for name in hk.__all__ if name not in ("errors", "figures", "PROMPT", "GENERATED")]


@pytest.mark.parametrize("name", public())
def test_every_public_name_says_what_it_is(name):
    thing = getattr(hk, name)
    assert (thing.__doc__ or "").strip() and not thing.__doc__.startswith(f"{name}("), name


def test_every_error_is_a_hookkit_error_and_says_when_it_is_raised():
    errors = [
        thing
        for thing in vars(hk.errors).values()
        if isinstance(thing, type) and issubclass(thing, Exception)
    ]
    assert len(errors) > 8
    assert all(issubclass(error, HookkitError) and error.__doc__ for error in errors)


def test_the_documentation_is_pages_that_need_no_network(tmp_path):
    words = [
        sys.executable,
        "-m",
        "pdoc",
        "--no-show-source",
        "-o",
        str(tmp_path),
        "hookkit.docs",
        "hookkit",
    ]
    subprocess.run(words, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")
    }
    assert {
        "index.html",
        "hookkit.html",
        "hookkit/docs/symptoms.html",
        "hookkit/docs/coming_from.html",
    } <= {*pages}
    assert "the batch differs" in pages["hookkit/docs/symptoms.html"].lower()
    for name, page in pages.items():
        assert not re.search(r'(src=|@import |<link[^>]*href=)"?https?:', page), name
