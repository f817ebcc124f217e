"""Every example in a docstring and in the guide runs, on the default model, and gives what stands there."""

import doctest
import html
import importlib
import re
import shlex
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import typer
from dictionaries import fitted, random_transcoders
from pages import GUIDE, ROOT, commands, links, new_session, run_command, run_page
from shown import Checker
from test_house import MODULES
from typer.main import get_command

import hookkit as hk
from hookkit.cli import app
from hookkit.errors import HookkitError
from hookkit.models import loading

NAVIGATION = (ROOT / "hookkit" / "docs" / "mkdocs.yml").read_text()

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
def words(smol, tmp_path_factory):
    """What an example may take as given."""
    torch.manual_seed(0)
    lm = smol
    given = {name: getattr(hk, name) for name in hk.__all__}
    for module in (hk.metrics, hk.stats, hk.results, hk.when, hk.figures):
        given |= {name: getattr(module, name) for name in dir(module)}
    run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
    other = hk.forward(lm, "She takes green tea with", hk.capture("resid_post.6"))
    inputs = lm.tokenizer("I like oat milk in my", return_tensors="pt")
    folder = fitted(lm, tmp_path_factory.mktemp("dictionary"))
    given |= {"folder": folder, "dictionary": hk.load_dictionary(folder)}
    given["transcoders"] = random_transcoders()
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


PAGES = sorted(GUIDE.glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_of_the_guide_shows_what_its_examples_print(path, smol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = loading.load
    monkeypatch.setattr(
        "hookkit.models.loading.load",
        lambda *name, **words: load(*name, **words) if name or words else smol,
    )
    for output in run_page(path.read_text(), new_session(smol), run_command):
        assert output.holds, output.printed


@pytest.mark.parametrize(
    ("shown", "holds"), [("1 a\n", True), ("2 a\n", False), ("...\n", True), ("1 ... b\n", False)]
)
def test_an_output_that_is_not_what_the_page_shows_is_noticed(shown, holds):
    for page in (
        f"```python\nprint('1 a')\n```\n\n```text\n{shown}```\n",
        f"```pycon\n>>> print('1 a')\n{shown}```\n",
        f"```console\n$ hookkit\n{shown}```\n",
    ):
        (output,) = run_page(page, {}, lambda line: "1 a\n")
        assert output.holds == holds


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_of_the_guide_can_be_reached_and_its_links_lead_somewhere(path):
    made = {"reference/index.md", "llms.txt", "tour.ipynb"}  # by `make docs`
    for link in links(path):
        assert link in made or (GUIDE / link).exists(), link
    for text in (NAVIGATION, (GUIDE / "index.md").read_text()):
        assert path.name in text


def parsed(line: str) -> bool:
    """Reads the words of a command, and runs nothing. Raises the command line's error if they are wrong."""
    _, *words = shlex.split(line, comments=True)
    command = get_command(app)
    context = command.make_context("hookkit", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        assert name and command
        context = command.make_context(name, list(words), parent=context)
    return True


def test_commands_of_the_guide_have_the_options_that_it_shows():
    count = 0
    for path in PAGES:
        for line in commands(path):
            assert parsed(line), line
            count += 1
    assert count > 20
    with pytest.raises(typer.BadParameter.__base__, match="No such option"):
        parsed("hookkit patch one two z --right ' Mary'")


def test_every_command_has_a_section_with_its_output():
    page = (GUIDE / "command-line.md").read_text()
    for name in get_command(app).commands:
        assert re.search(rf"^## (.*, )?{name}(,|$)", page, flags=re.MULTILINE), name
        assert f"$ hookkit {name}" in page, name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """The files of the built documentation, by path."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    words = [sys.executable, "-m", "hookkit.docs.build", str(folder)]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    pages = {}
    for path in folder.rglob("*"):
        if path.suffix in (".html", ".txt", ".ipynb"):
            pages[path.relative_to(folder).as_posix()] = path.read_text()
    return pages


def test_the_documentation_opens_on_topics_and_needs_no_network(site):
    assert {f"{path.stem}.html" for path in PAGES} < {*site}
    assert "first-steps.html" in site["index.html"] and "symptoms.html" in site["index.html"]
    for name, page in site.items():
        assert not re.search(r'(src=|@import |<link[^>]*href=)"?https?:', page), name


def test_code_on_the_pages_is_shown_as_it_is_written(site):
    text = re.sub(r"<[^>]*>", "", site["first-steps.html"])
    assert "logits = lm.model(**inputs).logits" in html.unescape(text)


def test_the_reference_and_llms_txt_have_every_public_name(site):
    names = [f"hk.{name}" for name in hk.__all__ if not isinstance(getattr(hk, name), ModuleType)]
    for module in ("metrics", "figures", "when", "datasets", "stats", "results", "types", "errors"):
        functions = dir(getattr(hk, module))
        names += [f"hk.{module}.{name}" for name in functions if not name.startswith("_")]
    assert len(names) > 150
    for name in names:
        assert f"### {name}\n" in site["llms.txt"], name
    assert 'id="hkforward"' in site["reference/index.html"]
