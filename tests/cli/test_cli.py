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


def test_a_dictionary_is_trained_by_a_command_that_says_each_step(hookkit, llama, tmp_path):
    lines = [f"Tea number {n} with milk, and coffee for Mary in Paris, {n * n}." for n in range(80)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "dictionary"
    words = ["--texts", str(tmp_path / "texts.txt"), "--site", "resid_post.1", "--out", str(out)]
    done = hookkit("dictionary", *words, "--k", "4", "--epochs", "2", "--features", "64", "--json")
    assert done.exit_code == 0, done.stderr
    assert "step 1 of 2" in done.stderr and "step 2 of 2" in done.stderr and str(out) in done.stderr
    values = {row["measure"]: row["value"] for row in json.loads(done.stdout)}
    assert values["l0"] == 4 and 0 < values["fvu"] < 1 and values["loss_clean"] > 0
    files = sorted(path.name for path in out.iterdir())
    assert files == ["cfg.json", "quality.csv", "sae_weights.safetensors"]
    dictionary = hk.load_dictionary(out)
    assert (str(dictionary.site), dictionary.n_features, dictionary.k) == ("resid_post.1", 64, 4)
    again = hookkit("dictionary", *words)
    assert again.exit_code == 2 and "has a dictionary already" in again.stderr


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


# ---- a corpus


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("I like oat milk in my\nTea with milk\n" * 6)
    return path


def test_a_shift_over_a_corpus_prints_both_directions(hookkit, llama, corpus):
    done = hookkit(
        "shift", "--corpus", str(corpus), "--boost", " coffee=4", "--top", "2", "--quiet"
    )
    assert done.exit_code == 0, done.stderr
    shifts = hk.token_shifts(llama, corpus, hk.boost(" coffee", by=4.0), top=2, progress=False)
    lines = done.stdout.splitlines()
    assert "the tokens that rose" in lines[0] and lines[2].startswith("' coffee'")
    assert str(int(shifts.table["promoted"].iloc[0])) in lines[2]
    as_json = json.loads(hookkit("shift", "--corpus", str(corpus), "--boost", " coffee=4", "--top",
                                 "2", "--quiet", "--json").stdout)  # fmt: skip
    assert as_json["token_shifts"][0]["token"] == " coffee"
    assert as_json["summary"][0]["positions"] == shifts.summary["positions"].item()


def test_a_shift_over_a_corpus_goes_to_a_folder_and_is_done_when_repeated(
    hookkit, llama, corpus, tmp_path
):
    words = ["shift", "--corpus", str(corpus), "--ban", " milk", "--out", str(tmp_path / "out")]
    first = hookkit(*words, "--quiet")
    assert first.exit_code == 0, first.stderr
    table = (tmp_path / "out" / "token_shifts.csv").read_bytes()
    again = hookkit(*words)
    assert again.exit_code == 0 and "TokenShifts(ban(' milk')" in again.stderr
    assert (tmp_path / "out" / "token_shifts.csv").read_bytes() == table
    other = hookkit(*words, "--top", "3")
    assert other.exit_code == 2 and "top 10 there and 3 now" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "default"], "--against goes with a corpus: add --corpus FILE"),
        (["--on-error", "skip"], "--on-error goes with a corpus"),
        (["--engine", "ray"], "--engine goes with a corpus"),
        (["--corpus", "no.txt", "--force", " a"], "is not a file of texts"),
        (["--corpus", "CORPUS"], "there is no hook"),
        (["--corpus", "CORPUS", "--force", " a", "Tea"], "a prompt cannot be given with --corpus"),
        (["--corpus", "CORPUS", "--force", " a", "--watch", " b"], "--watch cannot be given"),
        (["--corpus", "CORPUS", "--force", " a", "--movers", "4"], "--movers cannot be given"),
        (["--corpus", "CORPUS", "--force", " a", "--against", "x"], "is a hook: leave one"),
    ],
)
def test_options_of_a_corpus_that_would_have_no_effect_are_refused(
    hookkit, llama, corpus, words, said
):
    words = [str(corpus) if word == "CORPUS" else word for word in words]
    done = hookkit("shift", *words)
    assert done.exit_code == 2 and said in done.stderr, done.stderr
