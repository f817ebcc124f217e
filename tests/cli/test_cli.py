"""hookkit trace, harvest and sweep: a line for each step, a folder, a grid."""

import io
import json

import pandas as pd
import pytest

import hookkit as hk

MILK = "I like oat milk in my"


def test_a_trace_is_a_line_for_each_step_when_piped(hookkit, llama):
    first = llama.string(hk.ranks(hk.forward(llama, MILK), top=1)["token_id"].item())
    run = hk.generate(
        llama, MILK, hk.ban(first), hk.boost(" milk", by=1.0), max_new_tokens=3, do_sample=False
    )
    done = hookkit("trace", MILK, "--ban", first, "--boost", " milk=1", "--max-new-tokens", "3")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0, done.stderr
    assert len(lines) == 3 and f"banned {first!r} was first for the model" in lines[0]
    tokens = [llama.string(int(i)) for i in run.tokens[0, run.prompt_lengths[0] :]]
    assert all(repr(token) in line for token, line in zip(tokens, lines, strict=True))
    decoded = hk.candidates(hk.generate(llama, MILK, hk.ban(first), hk.boost(" milk", by=1.0), max_new_tokens=3,
                                      do_sample=False, trace=hk.trace(top=5)))  # fmt: skip
    for step, line in enumerate(lines):
        rows = decoded[(decoded["step"] == step) & (decoded["stage"] == "processed")]
        shown = [
            f"{token!r} {prob:.3f}" for token, prob in zip(rows["token"], rows["prob"], strict=True)
        ]
        assert line.endswith(f"[{', '.join(shown)}]"), "the candidates stand behind each token"


def test_a_trace_as_json_is_what_the_tables_say(hookkit, llama):
    words = "--json --sample --seed 1 --top-p 0.9 --max-new-tokens 2".split()  # noqa: SIM905
    done = hookkit(
        "trace", "-", *words, "--watch", " coffee", "--force", " coffee@1", given=MILK + "\n"
    )
    assert done.exit_code == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    run = hk.generate(llama, MILK, hk.force(" coffee", step=1), max_new_tokens=2, do_sample=True, top_p=0.9, seed=1,
                      trace=hk.trace(watch=" coffee"))  # fmt: skip
    decided = hk.decisions(run)
    assert [each["why"] for each in found] == decided["why"].tolist()
    assert [each["token_id"] for each in found] == decided["token_id"].tolist()
    assert found[1]["text"] == run.text[0]
    assert {"stage", "token", "rank", "prob", "drawn", "why"} <= set(found[0]["candidates"][0])


def test_a_harvest_writes_the_folder_that_the_call_writes_and_says_so_as_json(
    hookkit, llama, tmp_path
):
    texts = ["I like oat milk in my", "Tea with milk"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    words = ["resid_post.2", "z.1", "--keep-as", "bfloat16", "--pos", "-1", "--quiet"]
    done = hookkit("harvest", str(tmp_path / "texts.txt"), *words, "--out", str(tmp_path / "there"))
    assert (done.exit_code, done.stderr) == (0, "")
    said = {
        "folder": str(tmp_path / "there"),
        "rows": 2,
        "texts": 2,
        "left_out": 0,
        "sites": ["resid_post.2", "z.1"],
    }
    assert json.loads(done.stdout) == said
    made = hk.harvest(
        llama,
        texts,
        ["resid_post.2", "z.1"],
        tmp_path / "here",
        pos=-1,
        dtype="bfloat16",
        progress=False,
    )
    assert hk.open_harvest(tmp_path / "there").about == made.about
    assert made["z.1"][:].shape == hk.open_harvest(tmp_path / "there")["z.1"][:].shape


def test_as_many_tokens_run_together_in_a_harvest_as_are_asked_for(hookkit, llama, tmp_path):
    (tmp_path / "texts.txt").write_text("Tea with milk\n" * 6)
    counts = {}
    for tokens in ("1", "2048"):
        seen = []
        handle = llama.model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        words = ["--batch-tokens", tokens, "--quiet", "--out", str(tmp_path / tokens)]
        done = hookkit("harvest", str(tmp_path / "texts.txt"), "resid_post.2", *words)
        handle.remove()
        assert done.exit_code == 0, done.stderr
        counts[tokens] = len(seen)
    assert counts["1"] - counts["2048"] == 5, "six texts one by one, or all at once"


def test_a_sweep_prints_its_table_as_csv(hookkit, llama):
    words = ["--token", " coffee", "--against", " milk", "--layer", "1", "--layer", "2"]
    done = hookkit("sweep", "ablations", MILK, "attn_out", *words)
    assert done.exit_code == 0, done.stderr
    found = pd.read_csv(io.StringIO(done.stdout))
    wanted = hk.ablations(
        llama,
        [MILK],
        "attn_out",
        hk.metrics.logit_diff(" coffee", " milk"),
        layers=[1, 2],
        progress=False,
    )
    assert list(found.columns) == list(wanted.columns)
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), abs=1e-4)


def test_patching_takes_two_prompts_and_names_a_wish_that_cannot_be_met(hookkit):
    words = [
        "Mary gave milk to",
        "John gave milk to",
        "resid_pre",
        "--token",
        " John",
        "--layer",
        "1",
    ]
    done = hookkit("sweep", "patching", *words)
    assert done.exit_code == 0, done.stderr
    assert (
        done.stdout.splitlines()[0]
        == "layer,pos,row,prob,prob_before,prob_delta,prob_target,prob_effect"
    )
    for more, said in (
        (["--actors", "2"], "hookkit: --actors is an option of Ray's actors: add --engine ray"),
        (["--engine", "dask"], "hookkit: --engine 'dask' is unknown: say ray, or leave it out"),
    ):
        done = hookkit("sweep", "patching", *words, *more)
        assert (done.exit_code, done.stdout, done.stderr.splitlines()[-1]) == (2, "", said)
