"""How a command ends: done, refused with the reason, interrupted, or with nobody to read on. And its help."""

import os
import signal
import subprocess
import sys
import time

import pytest
import typer

import hookkit as hk
from hookkit.cli import app

MILK = "I like oat milk in my"
PROGRAM = [sys.executable, "-c", "from hookkit.cli import app; app(prog_name='hookkit')"]


def commands(found=None, path=()) -> dict[tuple[str, ...], typer.core.TyperCommand]:
    """Every command by the words that call it."""
    found = typer.main.get_command(app) if found is None else found
    if not hasattr(found, "commands"):
        return {path: found}
    return {
        words: each
        for name, one in found.commands.items()
        for words, each in commands(one, (*path, name)).items()
    }


NAMES = [" ".join(words) for words in commands()]


def test_the_commands_are_there():
    wanted = [
        "scan",
        "ranks",
        "shift",
        "generate",
        "trace",
        "compare",
        "sites",
        "doctor",
        "lens",
        "direct",
        "surprisal",
        "patch",
        "harvest",
        "dictionary",
        "steer",
    ]
    grids = [
        "sweep ablations",
        "sweep patching",
        "models list",
        "models where",
        "models fetch",
        "models remove",
    ]
    assert {*wanted, *grids} <= {*NAMES}


MODELLESS = ("new", "run", "show")  # they load no model themselves


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_each_has_an_example_that_can_be_read(name):
    words = name.split()
    shown = typer.testing.CliRunner().invoke(app, [*words, "--help"], prog_name="hookkit")
    assert shown.exit_code == 0
    assert f"hookkit {name}" in " ".join(shown.stdout.partition("Example:")[2].split())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_line_that_the_program_can_take(name):
    import shlex

    command = commands()[tuple(name.split())]
    words = shlex.split(command.epilog.partition("Example:")[2])
    assert words[0] == "hookkit" and words[1 : 1 + len(name.split())] == name.split()
    command.make_context("hookkit", words[1 + len(name.split()) :])


def test_options_that_are_common_are_called_the_same_everywhere():
    names = {
        name: {option for each in one.params for option in each.opts}
        for name, one in commands().items()
    }
    for words, options in names.items():
        if {"--csv", "--html"} & options:
            assert {"--csv", "--json", "--html", "--out", "--quiet"} <= options, words
        if words[0] not in (
            "models",
            "doctor",
            "diff",
            *MODELLESS,
        ):  # diff names its models as arguments
            assert {"--model", "--revision", "--device", "--dtype"} <= options, words
        if "--hook" in options:
            assert {"--hooks", "--ablate", "--force", "--ban", "--boost", "--steer"} <= options, (
                words
            )


def test_the_help_says_the_statuses_and_is_quick():
    began = time.perf_counter()
    code = "import sys\ntry:\n from hookkit.cli import app; app(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 3  # 0.35 s on a machine that does nothing else
    said, loaded = done.stdout.rsplit("\n", 2)[:2]
    assert "Exit status: 0 done; 1 " in said and "130" in said
    assert not {"torch", "transformers", "pandas", "numpy", "yaml", "huggingface_hub"} & set(
        loaded.split()
    )


BAD = [
    ("ranks", ["ranks"], "there is no prompt"),
    ("an empty prompt", ["ranks", ""], "prompt 0 is empty"),
    (
        "no file",
        ["ranks", "--prompts", "nowhere.txt"],
        "'nowhere.txt' cannot be read as a file of prompts: No such",
    ),
    ("pos", ["ranks", MILK, "--pos", "last"], "'last' is no place for --pos: write a number"),
    ("far", ["ranks", MILK, "--pos", "99"], "99"),
    ("watch", ["ranks", MILK, "--watch", "coffee"], "'coffee' is 2 tokens here"),
    (
        "forms",
        ["ranks", MILK, "--csv", "--json"],
        "csv, json were requested at once: give one of them",
    ),
    (
        "ending",
        ["ranks", MILK, "--out", "ranks.xlsx"],
        "ends in .xlsx: give .csv, .json, .html, .md or .tex, or a folder",
    ),
    (
        "form and ending",
        ["ranks", MILK, "--csv", "--out", "a.json"],
        "csv, json were requested at once",
    ),
    ("site", ["lens", MILK, "--site", "resid_pots"], "did you mean 'resid_post'"),
    ("no state", ["lens", MILK, "--site", "z"], "a lens reads states of the residual stream"),
    ("token", ["direct", MILK, "--token", "coffee"], "'coffee' is 2 tokens here"),
    ("one token", ["surprisal", "I"], "there is no token that logits predict"),
    ("no hook", ["shift", MILK], "there is no hook, and a shift compares a run without hooks"),
    (
        "page only",
        ["shift", MILK, "--ban", " tea", "--controls", "3"],
        "--controls and --generate are options of the page",
    ),
    (
        "hook",
        ["shift", MILK, "--hook", "ablate z.9.3"],
        "'ablate z.9.3' spells no hook: write VERB:WHAT@WHERE",
    ),
    (
        "verb",
        ["shift", MILK, "--hook", "ablat:z.9.3"],
        "there is no hook 'ablat'; did you mean 'ablate'?",
    ),
    ("json hook", ["generate", MILK, "--hook", "{}"], "this is no hook in JSON"),
    ("head", ["shift", MILK, "--ablate", "z.9.99"], "99"),
    (
        "amount",
        ["generate", MILK, "--boost", " tea"],
        "'boost: tea' is no amount for ' tea': write boost: tea=2.5",
    ),
    (
        "hooks file",
        ["generate", MILK, "--hooks", "none.yaml"],
        "'none.yaml' is no file of hooks that can be read",
    ),
    (
        "vector file",
        ["generate", MILK, "--steer", "none.safetensors*2"],
        "there is no file 'none.safetensors'",
    ),
    ("rules", ["generate", MILK, "--top-p", "0.9"], "add --sample"),
    (
        "temperature",
        ["generate", MILK, "--sample", "--temperature", "0"],
        "--temperature 0.0 is out of range",
    ),
    ("top-p", ["trace", MILK, "--sample", "--top-p", "7"], "give a number more than 0, at most 1"),
    ("unhooked", ["compare", MILK], "there is no hook, and a comparison needs"),
    ("along", ["compare", MILK, "--ban", " tea", "--along", "x"], "along='x' is unknown"),
    (
        "direction",
        ["steer", MILK],
        "a direction is --vector FILE, or --toward TEXT and --away TEXT",
    ),
    ("half", ["steer", MILK, "--toward", "good"], "a direction is --vector FILE"),
    (
        "every layer",
        ["steer", MILK, "--toward", "a b", "--away", "c d", "--site", "resid_post"],
        "name a layer",
    ),
    (
        "vector",
        ["steer", MILK, "--vector", "none.safetensors"],
        "'none.safetensors' cannot be read as the file of a vector",
    ),
    ("lengths", ["patch", MILK, "Tea"], "as long as one another"),
    ("one answer", ["patch", MILK, MILK], "both prompts are answered with"),
    (
        "figure",
        ["patch", MILK, MILK, "--figure", "a.docx"],
        "--figure a.docx: give a file that ends in .png",
    ),
    ("no site", ["sites", "resid_pots"], "did you mean 'resid_post'"),
    ("scan", ["scan", ""], "prompt 0 is empty"),
    ("scan's form", ["scan", MILK, "--csv"], "say --json, or --out FOLDER for all"),
    ("trace", ["trace", MILK, "--watch", "coffee"], "'coffee' is 2 tokens here"),
    ("texts", ["harvest", "nowhere.txt", "z.1", "--out", "harvest"], "nowhere.txt"),
    ("sweep", ["sweep", "ablations", MILK, "zz", "--token", " tea"], "there is no site 'zz'"),
    ("model", ["ranks", MILK, "--model", "no such/model at all"], "'no such/model at all'"),
    (
        "device",
        ["ranks", MILK, "--device", "toaster"],
        "device='toaster' is none of this machine, which has",
    ),
    (
        "dtype",
        ["ranks", MILK, "--dtype", "float3"],
        "dtype='float3' is none in which a model computes",
    ),
    ("unknown", ["doctor", "./nowhere"], "there is no './nowhere'"),
    ("not here", ["models", "remove", "no/model"], "no model 'no/model' is kept on this machine"),
]


@pytest.mark.parametrize(
    ("words", "message"), [each[1:] for each in BAD], ids=[each[0] for each in BAD]
)
def test_a_wish_that_cannot_be_met_is_said_and_ends_with_2(
    hookkit, words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = hookkit(*words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("hookkit: ") and message in done.stderr
    assert not [*tmp_path.iterdir()], "nothing is written"


@pytest.mark.parametrize(
    "words", [["ranks", MILK, "--top", "0"], ["ranks", MILK, "--nothing"], ["nothing"]]
)
def test_an_option_that_is_not_there_ends_with_2(hookkit, words):
    done = hookkit(*words)
    assert done.exit_code == 2 and not done.stdout and "Usage: hookkit" in done.stderr


def test_a_token_without_its_space_is_taken_as_several_and_that_is_said(hookkit):
    done = hookkit("generate", MILK, "--ban", "coffee", "--max-new-tokens", "1")
    words = (
        "hookkit: 'coffee' is 2 tokens here, taken one after the other; ' coffee' is one token\n"
    )
    assert (done.exit_code, done.stderr) == (0, words)
    assert hookkit("generate", MILK, "--ban", "coffee", "--max-new-tokens", "1", "-q").stderr == ""


def test_a_folder_that_cannot_be_written_is_said(hookkit, tmp_path):
    (tmp_path / "file").write_text("")
    done = hookkit("ranks", MILK, "--out", str(tmp_path / "file" / "ranks.csv"))
    assert done.exit_code == 2 and "is no folder, where one is needed" in done.stderr


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.split()[0] not in ("models", *MODELLESS)]
)
def test_ctrl_c_ends_every_command_with_a_word_and_130(hookkit, name, monkeypatch, tmp_path):
    def interrupted(*given, **words):
        raise KeyboardInterrupt

    monkeypatch.setattr("hookkit.models.loading.load", interrupted)
    (tmp_path / "texts.txt").write_text("Tea with milk.\n")
    ban = [MILK, "--ban", " tea"]
    words = {"harvest": [str(tmp_path / "texts.txt"), "z.1", "--out", str(tmp_path / "a")], "shift": ban, "compare": ban,
             "steer": [MILK, "--toward", "good", "--away", "bad"], "sweep ablations": [MILK, "z", "--token", " tea"],
             "sweep patching": [MILK, MILK, "z", "--token", " tea"], "patch": [MILK, MILK], "sites": [], "doctor": [], "dictionary": ["--out", str(tmp_path / "b")], "eval": ["arc_easy"],
             "feature": ["feat.resid_post.12.7", "--texts", str(tmp_path / "texts.txt")], "diff": ["default", "default", MILK]}  # fmt: skip
    done = hookkit(*name.split(), *words.get(name, [MILK]))
    assert done.exit_code == 130 and not done.stdout
    assert done.stderr.startswith("hookkit: interrupted") and len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_a_run_of_experiments(hookkit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\nos._exit(0)"
    )
    done = hookkit("run", "mine.py")
    assert (done.exit_code, done.stdout) == (130, "") and done.stderr.endswith(
        "hookkit: interrupted\n"
    )


def test_a_real_ctrl_c_leaves_what_was_said(smol):
    words = ["trace", MILK, "--max-new-tokens", "2000", "--device", "cpu"]
    with subprocess.Popen(
        [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert "' coffee'" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        assert running.stderr.read() == "hookkit: interrupted; the steps above were recorded\n"


def test_a_pipe_that_is_closed_is_no_error(smol):
    words = ["ranks", MILK, "--top", "49000", "--csv", "--device", "cpu"]
    with subprocess.Popen(
        [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline().startswith('"row","pos","token"')
        running.stdout.close()
        assert running.wait(60) == 0
        assert running.stderr.read() == ""


def test_a_terminal_has_a_table_in_colour_and_a_pipe_has_none():
    import pty

    there, here = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    done = subprocess.run(
        [*PROGRAM, "models", "where"], stdout=here, stderr=subprocess.PIPE, env=env, check=True
    )
    os.close(here)
    shown = os.read(there, 65536).decode()
    os.close(there)
    piped = subprocess.run(
        [*PROGRAM, "models", "where"], capture_output=True, text=True, check=True, env=env
    )
    assert "\x1b[" in shown and not done.stderr
    assert (
        "\x1b" not in piped.stdout
        and [line.rstrip() for line in piped.stdout.splitlines()] == piped.stdout.splitlines()
    )
    assert (
        hk.__version__
        in subprocess.run(
            [*PROGRAM, "--version"], capture_output=True, text=True, check=True
        ).stdout
    )
