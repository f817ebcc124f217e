"""The README's Python runs from top to bottom in one session, and prints what the README shows."""

import pytest
from pages import ROOT, commands, links, run_command, run_page
from shown import same
from test_docs import parsed

README = ROOT / "README.md"


def test_the_readme_shows_what_its_code_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = run_page(README.read_text(), {}, run_command)
    assert len(outputs) >= 6
    for output in outputs:
        assert output.holds, output.printed
    assert (tmp_path / "what_changed" / "report.html").exists()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_its_commands_have_the_options_that_it_shows():
    shown = commands(README)
    assert len(shown) >= 8 and shown[0].startswith("hookkit scan")
    for line in shown:
        for part in line.split("#")[0].split("&&"):
            assert parsed(part), part


@pytest.mark.parametrize("path", links(README))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "printed", ["rank 6", "rank 5 0.97", "rank 5 0.954", "ranks 5 0.96", "rank 5 0.96 0.96"]
)
def test_only_a_last_digit_may_differ(printed):
    assert (
        same("rank 5  0.95", "rank 5 0.96")
        and same("0.7", "0.71")
        and not same("rank 5  0.95", printed)
    )
