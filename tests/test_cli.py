"""The command line, run as a user runs it: in a process of its own, piped."""

import io
import json
import subprocess
import sys

import pandas as pd
import pytest

import hookkit as hk

MILK = "I like oat milk in my"


def process(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hookkit.cli import app; app(prog_name='hookkit')", *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=300)


def test_a_trace_is_a_line_for_each_step_when_piped(smol):
    run = hk.generate(smol, MILK, hk.ban(" coffee"), hk.boost(" tea", by=1.0), max_new_tokens=3, do_sample=False)
    done = process("trace", MILK, "--ban", " coffee", "--boost", " tea=1", "--max-new-tokens", "3", "--device", "cpu")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 3 and "banned ' coffee' was first for the model" in lines[0]
    tokens = [smol.string(int(i)) for i in run.tokens[0, run.prompt_lengths[0] :]]
    assert all(repr(token) in line for token, line in zip(tokens, lines, strict=True))


def test_a_trace_as_json_is_what_the_tables_say(smol):
    words = [
        "--json",
        "--sample",
        "--seed",
        "1",
        "--top-p",
        "0.9",
        "--watch",
        " tea",
        "--max-new-tokens",
        "2",
        "--force",
        " tea@1",
    ]
    done = process("trace", "-", *words, "--device", "cpu", given=MILK + "\n")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    run = hk.generate(smol, MILK, hk.force(" tea", step=1), max_new_tokens=2, do_sample=True, top_p=0.9, seed=1,
                      trace=hk.trace(watch=" tea"))  # fmt: skip
    decided = hk.decisions(run)
    assert [each["why"] for each in found] == decided["why"].tolist()
    assert [each["token_id"] for each in found] == decided["token_id"].tolist()
    assert found[1]["text"] == run.text[0]
    assert {"stage", "token", "rank", "prob", "drawn", "why"} <= set(found[0]["candidates"][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--boost", " tea"], "--boost ' tea' is no amount for a token"),
        (["--hook", "{}"], "this is no hook in JSON"),
        (["--top-p", "0.9"], "add --sample"),
        (["--model", "no such/model at all"], "hookkit: "),
    ],
)
def test_a_wish_that_cannot_be_met_is_said_on_standard_error(smol, words, message):
    done = process("trace", MILK, *words, "--device", "cpu")
    assert done.returncode == 2
    assert not done.stdout
    assert message in done.stderr.replace("\n", " ").replace("│", "") and "Traceback" not in done.stderr


def test_help_is_light_and_has_an_example():
    code = "import sys; sys.argv = ['hookkit', '--help']\ntry:\n from hookkit.cli import app; app()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "Example: hookkit trace" in process("trace", "--help").stdout


def test_a_harvest_writes_the_folder_that_the_call_writes_and_says_so_as_json(smol, tmp_path):
    texts = ["I like oat milk in my", "Tea with milk"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    words = ["resid_post.2", "z.1", "--dtype", "bfloat16", "--pos", "-1", "--device", "cpu", "--no-progress"]
    done = process("harvest", str(tmp_path / "texts.txt"), *words, "--out", str(tmp_path / "there"))
    assert done.returncode == 0, done.stderr
    said = {"folder": str(tmp_path / "there"), "rows": 2, "texts": 2, "left_out": 0, "sites": ["resid_post.2", "z.1"]}
    assert json.loads(done.stdout) == said
    made = hk.harvest(smol, texts, ["resid_post.2", "z.1"], tmp_path / "here", pos=-1, dtype="bfloat16", progress=False)
    assert hk.open_harvest(tmp_path / "there").about == made.about
    assert made["z.1"][:].shape == hk.open_harvest(tmp_path / "there")["z.1"][:].shape


def test_a_sweep_prints_its_table_as_csv(smol):
    words = ["--token", " coffee", "--against", " tea", "--layer", "3", "--layer", "9", "--device", "cpu"]
    done = process("sweep", "ablations", MILK, "attn_out", *words)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(io.StringIO(done.stdout))
    wanted = hk.ablations(smol, [MILK], "attn_out", hk.logit_diff(" coffee", " tea"), layers=[3, 9], progress=False)
    assert list(found.columns) == list(wanted.columns)
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), abs=1e-4)


def test_patching_takes_two_prompts_and_names_a_wish_that_cannot_be_met():
    words = ["Mary gave tea to", "John gave tea to", "resid_pre", "--token", " John", "--layer", "3", "--device", "cpu"]
    done = process("sweep", "patching", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "layer,pos,row,prob,prob_before,prob_delta,prob_effect"
    for more, said in (
        (["--actors", "2"], "hookkit: --actors is of Ray's actors: add --engine ray"),
        (["--engine", "dask"], "hookkit: --engine 'dask' is unknown: say ray, or leave it out"),
    ):
        done = process("sweep", "patching", *words, *more)
        assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", said)
