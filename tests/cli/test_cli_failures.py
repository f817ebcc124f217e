"""Every failure of the command line ends in "hookkit: …" and status 2, and one that needs no model loads none."""

import io
import json
import os
import subprocess
import sys

import pandas as pd
import pytest

import hookkit as hk
from hookkit.errors import BadFile

MILK = "I like oat milk in my"
PROGRAM = [sys.executable, "-c", "from hookkit.cli import app; app(prog_name='hookkit')"]
ESCAPE = "\x1b]0;PWN\x07"

BAD_FILES = {
    "nowhere": None,
    "a folder": "folder",
    "not UTF-8": b"\xff\xfe\x00tea",
    "a null byte in its name": "\0",
}


@pytest.fixture
def no_model(monkeypatch):
    def load(*name, **words):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hookkit.models.loading.load", load)


@pytest.fixture
def bad(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00tea")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("[" * 3000)
    (tmp_path / "texts.txt").write_text("tea with milk\n")
    return tmp_path


SEVERAL = (
    "ranks",
    "lens",
    "surprisal",
    "shift",
    "generate",
    "compare",
)  # commands that read --prompts
EDITED = (*SEVERAL, "direct", "scan", "trace")  # commands that take hooks
NEEDED = {"direct": ["--token", " tea"], "shift": ["--ban", " tea"], "compare": ["--ban", " tea"]}
WITHOUT_MODEL = [
    *[[name, "--prompts", file, *NEEDED.get(name, [])] for name in SEVERAL for file in ("nowhere", "folder", "file")],
    *[[name, MILK, "--hooks", file, *NEEDED.get(name, [])] for name in EDITED
      for file in ("nowhere", "folder", "file", "deep.json", "deep.yaml", "texts.txt")],
    *[[name, MILK, "--hook", text, *NEEDED.get(name, [])] for name in EDITED
      for text in ("ablate z.9", "ablat:z.9", "skip_block:x", "steer:nowhere*2", "boost: tea", "swap: tea")],
    *[[name, MILK, "--steer", "nowhere.safetensors", *NEEDED.get(name, [])] for name in EDITED],
    *[[name, MILK, "--csv", "--json", *NEEDED.get(name, [])] for name in (*SEVERAL, "direct", "scan")],
    *[[name, MILK, "--out", "a.xlsx", *NEEDED.get(name, [])] for name in (*SEVERAL, "direct", "scan")],
    ["shift", MILK], ["compare", MILK],
    ["steer", MILK], ["steer", MILK, "--vector", "nowhere"], ["steer", MILK, "--vector", "folder"],
    ["harvest", "nowhere", "z.1", "--out", "h"], ["harvest", "folder", "z.1", "--out", "h"],
    ["harvest", "texts.txt", "z.1", "--out", "file"], ["harvest", "texts.txt", "z.1", "--out", "h", "--engine", "x"],
    ["dictionary", "--site", "resid_post.1"], ["dictionary", "--texts", "nowhere", "--out", "h"],
    ["dictionary", "--texts", "folder", "--out", "h"], ["dictionary", "--out", "file"],
    ["sweep", "ablations", MILK, "z", "--token", " tea", "--save", "file"],
    ["sweep", "ablations", MILK, "z", "--token", " tea", "--engine", "x"],
    ["sweep", "patching", MILK, MILK, "z", "--token", " tea", "--save", "file"],
    ["patch", MILK, MILK, "--save", "file"], ["patch", MILK, MILK, "--figure", "a.docx"],
    ["generate", MILK, "--engine", "x"], ["generate", MILK, "--engine-argument", "max_model_len=9"],
    ["generate", MILK, "--engine", "vllm", "--engine-argument", "max_model_len"],
    ["generate", MILK, "--engine", "vllm", "--engine-argument", "enable_lora=true"],
    ["generate", MILK, "--top-p", "0.5"], ["trace", MILK, "--sample", "--top-p", "7"],
    ["show", "nowhere"], ["show", "file"], ["show", "folder"], ["show", "folder", "--against", "last"],
    ["show", "folder", "--against", "--output=x"],
    ["run", "nowhere.py"], ["run", "folder"],
    ["new", "a-b"], ["new", "tea", "--folder", "file"], ["new", "tea", "--question", "no question"],
    ["models", "remove", "no/model"],
]  # fmt: skip


@pytest.mark.parametrize(
    "words", WITHOUT_MODEL, ids=[" ".join(words[:4])[:60] for words in WITHOUT_MODEL]
)
def test_what_can_be_known_before_is_said_with_status_2_and_no_model(hookkit, no_model, bad, words):
    before = sorted(path.name for path in bad.iterdir())
    done = hookkit(*words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("hookkit: ")
        and len(done.stderr) < 2000
        and done.stderr.count("\n") < 6
    )
    assert sorted(path.name for path in bad.iterdir()) == before, "nothing is written"


def test_what_needs_no_model_imports_no_torch(bad):
    """In one process, one command after the other; a hook's text is checked by making the hook, which needs torch."""
    (bad / "res" / "one").mkdir(parents=True)
    (bad / "res" / "one" / "report.html").write_text("x")
    commands = [
        ["ranks", "--prompts", "nowhere"], ["ranks", "-"], ["shift", "x"], ["compare", "x", "--hooks", "res"],
        ["lens", "x", "--csv", "--json"], ["ranks", "x", "--pos", "last"], ["generate", "x", "--top-p", "1"],
        ["new", "tea"], ["show", "res"], ["show", "res/one"], ["show", "res", "--against", "last"],
        ["models", "list"], ["models", "list", "--json"], ["models", "where"], ["models", "where", "--csv"],
        ["--version"], ["--help"], ["models", "--help"], ["ranks", "--help"],
        *[words for words in WITHOUT_MODEL if not {"--hook", "--steer"} & {*words}],
    ]  # fmt: skip
    code = """
import json, sys
from hookkit.cli import app
for words in json.loads(sys.argv[1]):
    try:
        app(words, prog_name="hookkit")
    except SystemExit:
        pass
    if "torch" in sys.modules:
        sys.exit(f"torch after {words}")
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], cwd=bad, capture_output=True, text=True, input="")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def standing(monkeypatch, content: bytes | None) -> None:
    monkeypatch.setattr(
        sys, "stdin", None if content is None else io.TextIOWrapper(io.BytesIO(content))
    )


@pytest.mark.parametrize("name", ["ranks", "trace"])
def test_standard_input_that_is_no_text_or_closed_is_said(name, no_model, monkeypatch, capsys):
    import typer

    from hookkit.cli import options

    assert typer
    for content, words in (
        (b"\xff\xfetea\n", "no text in UTF-8"),
        (None, "standard input is closed"),
    ):
        standing(monkeypatch, content)
        with pytest.raises(hk.errors.BadPrompt, match=words):
            options.read_prompt("-") if name == "trace" else options.PromptOptions(
                prompt=["-"]
            ).read()
    standing(monkeypatch, b"\xef\xbb\xbftea\r\nmilk\r\n")
    assert options.PromptOptions(prompt=["-"]).read() == ["tea", "milk"]
    with pytest.raises(hk.errors.BadPrompt, match="no text in UTF-8"):
        options.read_prompt("\udcff")


FAULTS = [
    (OSError(28, "No space left on device"), "hookkit: No space left on device\n"),
    (
        OSError(30, "Read-only file system", "there/t.csv"),
        "hookkit: Read-only file system: there/t.csv\n",
    ),
    (PermissionError(13, "Permission denied", "x"), "hookkit: Permission denied: x\n"),
    (MemoryError(), "hookkit: there is not enough memory"),
    (RecursionError("too deep"), "hookkit: RecursionError: too deep. This is a fault of hookkit"),
    (RuntimeError("a\nb"), "hookkit: RuntimeError: a\nb. This is a fault of hookkit"),
    (BadFile(f"a{ESCAPE}b"), "hookkit: a\\x1b]0;PWN\\x07b\n"),
    (ValueError(f"a{ESCAPE}b"), "hookkit: ValueError: a\\x1b]0;PWN\\x07b."),
]


@pytest.mark.parametrize(
    ("error", "words"), FAULTS, ids=[type(error).__name__ for error, _ in FAULTS]
)
def test_whatever_goes_wrong_is_said_in_a_line_with_status_2(hookkit, monkeypatch, error, words):
    def load(*name, **given):
        raise error

    monkeypatch.setattr("hookkit.models.loading.load", load)
    for command in (
        ["ranks", MILK],
        ["sites"],
        ["doctor"],
        ["generate", MILK],
        ["patch", MILK, MILK],
    ):
        done = hookkit(*command, "-q")
        assert done.exit_code == 2 and done.stderr.startswith(words) and not done.stdout
    if not isinstance(error, OSError | MemoryError):
        monkeypatch.setenv("HOOKKIT_TRACEBACK", "1")
        assert isinstance(error, BadFile) or hookkit("ranks", MILK).exception is error


@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        (">/dev/full", "No space left on device"),
        (">&-", "standard output is closed"),
        ("<&- >/dev/full", "No space left"),
    ],
)
def test_an_output_that_takes_nothing_is_said(redirection, words, tmp_path):
    code = "import sys; from hookkit.cli import app; app(['show', '.'], prog_name='hookkit')"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "report.html").write_text("x")
    line = f'{sys.executable} -c "{code}" {redirection}'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("hookkit: ") and words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def on_a_terminal(*words, cwd) -> str:
    """What a terminal gets, from standard output and standard error."""
    import pty

    screen, side = pty.openpty()
    running = subprocess.Popen(
        [*PROGRAM, *words], stdout=side, stderr=side, stdin=side, close_fds=True, cwd=cwd
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    running.wait()
    os.close(screen)
    return shown.decode("utf-8", "replace")


def test_escapes_in_files_of_others_never_reach_a_terminal(tmp_path):
    one = tmp_path / "res" / "one"
    one.mkdir(parents=True)
    (one / "report.html").write_text("x")
    bad = f"a{ESCAPE}\u202e\u009b31m[red]b[/red]"
    about = dict.fromkeys(("title", "question", "answer", "command"), bad)
    (one / "about.json").write_text(json.dumps(about))
    pd.DataFrame({bad: [bad, "x"], "number": [1.0, 2.0]}).to_csv(one / "t.csv", index=False)
    (tmp_path / f"hooks{ESCAPE}.yaml").write_text(f'- "{ESCAPE}"\n', encoding="utf-8")
    for words in (
        ["show", "res/one"], ["show", "res"], ["show", "res", "--csv"], ["show", "res", "--json"], ["show", bad],
        ["ranks", "x", "--hooks", f"hooks{ESCAPE}.yaml"], ["run", f"{bad}.py"], ["ranks", "--prompts", bad],
    ):  # fmt: skip
        shown = on_a_terminal(*words, cwd=tmp_path)
        assert (
            "\x1b]" not in shown
            and "\x07" not in shown
            and "\u202e" not in shown
            and "\u009b" not in shown
        ), words
        if words == ["show", "res/one"]:
            assert "[red]b[/red]" in shown.replace("\r\n", "")


def test_nothing_is_said_but_by_the_functions_that_print_escapes():
    import re
    from pathlib import Path

    package = Path(hk.__file__).parent
    found = {}
    for path in (package / "cli").glob("*.py"):
        count = len(
            re.findall(
                r"typer\.echo\(|sys\.std(?:out|err)\.write\(|[^.\w]print\(", path.read_text()
            )
        )
        if count:
            found[path.name] = count
    assert found == {
        "app.py": 1,
        "output.py": 5,
        "experiments.py": 1,
    }  # the last one is in the text of an experiment
