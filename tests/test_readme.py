"""The README's Python runs from top to bottom in one session, and prints what the README shows."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from shown import same

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_what_its_code_prints(smol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    shown = 0
    for (language, code), (after, output) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), session)
        if after == "text":
            assert same(output, printed.getvalue()), printed.getvalue()
            shown += 1
    assert shown >= 3


def test_the_readme_shows_what_its_commands_say(smol, hookkit, monkeypatch):
    monkeypatch.setattr("hookkit.models.loading.load", lambda: smol)
    shown = [code for language, code in BLOCKS if language == "console"]
    assert len(shown) >= 2
    for code in shown:
        command, output = code.removeprefix("$ hookkit ").split("\n", 1)
        printed = hookkit(*shlex.split(command)).stdout
        assert same(output, printed), printed


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)", README) or ["README.md"])
def test_every_link_leads_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()


@pytest.mark.parametrize(
    "printed", ["rank 6", "rank 5 0.97", "rank 5 0.954", "ranks 5 0.96", "rank 5 0.96 0.96"]
)
def test_only_a_last_digit_may_differ(printed):
    assert (
        same("rank 5  0.95", "rank 5 0.96")
        and same("0.7", "0.71")
        and not same("rank 5  0.95", printed)
    )
