"""What a command says is what the library's function gives: as JSON, as CSV, as a page, as text for a pipe."""

import io
import json
from html import unescape

import pandas as pd
import pytest
from conftest import PROMPTS

import hookkit as hk

MILK = "I like oat milk in my"
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
EDITS = ["--force", " coffee", "--ablate", "z.1.3"]
HOOKS = [hk.ablate("z.1.3"), hk.force(" coffee")]


def same(found: list[dict], table: pd.DataFrame) -> None:
    """The records of a JSON table are the rows of another, numbers up to a batch's rounding."""
    assert [list(row) for row in found] == [list(table.columns)] * len(table)
    for name in table.columns:
        got, wanted = [row[name] for row in found], table[name].tolist()
        if pd.api.types.is_float_dtype(table[name]):
            known = [(a, b) for a, b in zip(got, wanted, strict=True) if a is not None]
            assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-4), name
        else:
            assert got == [None if each is pd.NA else each for each in wanted], name


def test_ranks_of_several_prompts_are_those_of_a_batch(hookkit, llama):
    done = hookkit("ranks", *PROMPTS, "--top", "3", "--watch", " milk", "--json")
    assert done.exit_code == 0, done.stderr
    same(json.loads(done.stdout), hk.ranks(hk.forward(llama, PROMPTS), top=3, watch=" milk"))


def test_a_word_is_written_after_word_colon(hookkit, llama):
    done = hookkit(
        "shift", MILK, "--ban", "word:coffee", "--boost", "word:milk=2", "--watch", "word:coffee",
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    hooks = [hk.ban(hk.word("coffee")), hk.boost(hk.word("milk"), by=2.0)]
    before, after = hk.forward(llama, MILK), hk.forward(llama, MILK, *hooks)
    wanted = hk.rank_shift(before, after, watch=hk.word("coffee"))
    shifts = pd.DataFrame(json.loads(done.stdout)["shifts"])
    assert shifts["token_id"].tolist() == wanted["token_id"].tolist()
    assert shifts["why"].tolist() == wanted["why"].tolist()
    coffee = shifts[shifts["token_id"] == llama.token(" coffee")].iloc[0]
    assert "watched" in coffee["why"] and coffee["prob_after"] == 0
    done = hookkit("ranks", MILK, "--watch", "word:quokka")
    assert done.exit_code == 2 and "no spelling of one token" in done.stderr


def test_prompts_are_arguments_lines_of_a_file_and_lines_of_standard_input(
    hookkit, llama, tmp_path
):
    (tmp_path / "prompts.txt").write_text("\r\n".join(PROMPTS[1:]) + "\r\n")
    by_file = hookkit(
        "ranks", PROMPTS[0], "--prompts", str(tmp_path / "prompts.txt"), "--top", "2", "--csv"
    )
    by_input = hookkit("ranks", "-", "--top", "2", "--csv", given="\n".join(PROMPTS) + "\n")
    assert by_file.exit_code == 0, by_file.stderr
    assert (
        by_file.stdout
        == by_input.stdout
        == hookkit("ranks", *PROMPTS, "--top", "2", "--csv").stdout
    )
    assert pd.read_csv(io.StringIO(by_file.stdout))["row"].tolist() == [0, 0, 1, 1, 2, 2]


def test_ranks_are_of_the_position_that_is_asked_for(hookkit, llama):
    for pos, wanted in (
        ("0", 0),
        ("1:3", slice(1, 3)),
        ("all", slice(None)),
        ("at('milk')", hk.at("milk")),
    ):
        done = hookkit("ranks", MILK, "--pos", pos, "--top", "1", "--json")
        same(json.loads(done.stdout), hk.ranks(hk.forward(llama, MILK), pos=wanted, top=1))


def test_a_shift_has_the_table_and_the_distance_of_the_two_runs(hookkit, llama):
    done = hookkit("shift", MILK, *EDITS, "--watch", " milk", "--top", "4", "--json")
    assert done.exit_code == 0, done.stderr
    before, after = hk.forward(llama, MILK), hk.forward(llama, MILK, *HOOKS)
    found = json.loads(done.stdout)
    same(found["shifts"], hk.rank_shift(before, after, top=4, watch=" milk"))
    same(found["summary"], hk.stats.shift_summary(before, after, top=4))
    table = pd.read_csv(io.StringIO(hookkit("shift", MILK, *EDITS, "--csv").stdout))
    assert table["token"].tolist() == hk.rank_shift(before, after)["token"].tolist()


def test_the_page_of_a_shift_is_the_report(hookkit, llama, tmp_path):
    done = hookkit("shift", MILK, *EDITS, "--out", str(tmp_path / "moved"), "--top", "3")
    assert done.exit_code == 0 and not done.stdout, done.stderr
    assert f"hookkit: wrote {tmp_path / 'moved' / 'report.html'}" in done.stderr
    wanted = hk.shift_report(llama, MILK, *HOOKS, top=3).tables["watched"]
    found = pd.read_csv(tmp_path / "moved" / "watched.csv")
    assert found["rank_after"].tolist() == wanted["rank_after"].tolist()
    page = hookkit("shift", MILK, *EDITS, "--html", "--top", "3").stdout
    assert page.startswith("<!doctype html>") and "coffee" in page


def test_the_lens_is_that_of_the_library(hookkit, llama):
    done = hookkit("lens", MILK, "--site", "resid_mid", "--top", "1", "--watch", " milk", "--json")
    same(
        json.loads(done.stdout), hk.logit_lens(llama, MILK, sites="resid_mid", top=1, watch=" milk")
    )


def test_direct_logits_are_of_the_first_token_unless_one_is_named(hookkit, llama):
    run = hk.forward(llama, MILK)
    done = hookkit("direct", MILK, "--json")
    first = hk.ranks(run, top=2)["token_id"].tolist()
    same(json.loads(done.stdout), hk.direct_logits(run, first[0]))
    done = hookkit(
        "direct",
        MILK,
        "--token",
        " milk",
        "--against",
        " coffee",
        "--heads",
        "--json",
        "--pos",
        "2",
    )
    same(
        json.loads(done.stdout),
        hk.direct_logits(run, " milk", against=" coffee", heads=True, pos=2),
    )
    assert "the logit of ' milk' minus that of ' coffee'" in done.stderr


def test_surprisal_is_that_of_the_library(hookkit, llama):
    done = hookkit("surprisal", MILK, "--top", "2", "--json")
    same(json.loads(done.stdout), hk.surprisal(hk.forward(llama, MILK), top=2))


def test_what_is_generated_is_what_the_library_generates(hookkit, llama):
    words = [
        "--ban",
        " coffee",
        "--sample",
        "--seed",
        "3",
        "--top-p",
        "0.9",
        "--max-new-tokens",
        "4",
    ]
    given = {"do_sample": True, "seed": 3, "top_p": 0.9, "max_new_tokens": 4}
    run = hk.generate(llama, PROMPTS, hk.ban(" coffee"), **given)
    done = hookkit("generate", *PROMPTS, *words, "--json")
    assert [row["generated"] for row in json.loads(done.stdout)] == run.generated, done.stderr
    plain = hookkit("generate", *PROMPTS, *words)
    assert plain.stdout == "".join(
        f"{prompt}{text}\n" for prompt, text in zip(PROMPTS, run.generated, strict=True)
    )


def test_a_comparison_is_that_of_the_library(hookkit, llama):
    done = hookkit(
        "compare", MILK, "--skip-block", "1", "--max-new-tokens", "3", "--json", "--watch", " milk"
    )
    both = hk.compare_generations(
        llama, MILK, hk.skip_block(1), max_new_tokens=3, do_sample=False, watch=" milk"
    )
    found = json.loads(done.stdout)
    for name in ("texts", "summary", "shifts"):
        same(found[name], getattr(both, name))


def test_a_vector_is_made_kept_and_used(hookkit, llama, tmp_path):
    words = [
        "--toward",
        "I love it",
        "--away",
        "I hate it",
        "--site",
        "resid_post.1",
        "--max-new-tokens",
        "3",
    ]
    path = str(tmp_path / "mood.safetensors")
    made = hookkit(
        "steer", "The film was", *words, "--dose", "0.3", "--dose", "0", "--save", path, "--json"
    )
    assert made.exit_code == 0, made.stderr
    vector = hk.mean_difference(llama, "I love it", "I hate it", "resid_post.1")[0]
    settings = {"max_new_tokens": 3, "do_sample": False}
    hooked = hk.generate(llama, "The film was", vector.steer(dose=0.3), **settings).generated
    wanted = [*hk.generate(llama, "The film was", **settings).generated, *hooked]
    assert [(row["dose"], row["generated"]) for row in json.loads(made.stdout)] == list(
        zip([0, 0.3], wanted, strict=True)
    )
    again = hookkit(
        "steer",
        "The film was",
        "--vector",
        path,
        "--dose",
        "0.3",
        "--max-new-tokens",
        "3",
        "--json",
    )
    assert [row["generated"] for row in json.loads(again.stdout)] == hooked
    same(
        json.loads(hookkit("ranks", "The film was", "--steer", f"{path}*0.5", "--json").stdout),
        hk.ranks(hk.forward(llama, "The film was", vector.steer(scale=0.5))),
    )


def test_patching_measures_the_two_answers_and_shows_the_strongest_places(hookkit, llama, tmp_path):
    words = ["--layer", "0", "--layer", "2", "--pos", "15", "--pos", "-1"]
    answers = [
        hk.ranks(hk.forward(llama, text), top=1)["token_id"].item() for text in (CLEAN, CORRUPTED)
    ]
    wanted = hk.patching(llama, CLEAN, CORRUPTED, "resid_pre", hk.metrics.logit_diff(*answers), layers=[0, 2],
                         pos=[15, -1], progress=False)  # fmt: skip
    done = hookkit("patch", CLEAN, CORRUPTED, *words, "--json")
    assert (
        f"the logit of {llama.string(answers[0])!r} minus that of {llama.string(answers[1])!r}"
        in done.stderr
    )
    same(json.loads(done.stdout), wanted)
    shown = hookkit(
        "patch", CLEAN, CORRUPTED, *words, "--top", "1", "--figure", str(tmp_path / "p.png")
    )
    assert shown.exit_code == 0 and len(shown.stdout.splitlines()) == 2, shown.output
    strongest = wanted.loc[wanted["logit_diff_effect"].abs().idxmax()]
    assert shown.stdout.splitlines()[1].split()[:2] == [
        str(int(strongest["layer"])),
        str(int(strongest["pos"])),
    ]
    assert (tmp_path / "p.png").stat().st_size > 1000
    tokens = [llama.string(token) for token in llama.encode(CORRUPTED)]
    assert shown.stdout.splitlines()[0].split()[:3] == ["layer", "pos", "token"]
    assert repr(tokens[int(strongest["pos"])]) in shown.stdout.splitlines()[1]


def test_sites_are_described_filtered_and_inspected(hookkit, llama):
    same(json.loads(hookkit("sites", "--json").stdout), llama.describe())
    found = json.loads(hookkit("sites", "mlp_*", "z.1.3", "--json").stdout)
    assert [row["site"] for row in found] == ["mlp_in", "mlp_pre", "mlp_post", "mlp_out", "z.1.3"]
    assert (
        found[-1]["module"] == "model.layers.1.self_attn.o_proj"
        and found[-1]["sizes"] == "batch pos 8"
    )
    gone = json.loads(hookkit("sites", "--missing", "--json").stdout)
    assert {row["site"] for row in gone} == set(llama.describe().query("missing != ''")["site"])


def test_a_scan_has_the_tables_of_the_library_and_commands_that_run(hookkit, llama):
    import shlex

    done = hookkit("scan", MILK, "--top", "3", "--json")
    assert done.exit_code == 0, done.stderr
    found, run = json.loads(done.stdout), hk.forward(llama, MILK)
    first, second = hk.ranks(run, top=2)["token_id"].tolist()
    same(found["ranks"], hk.ranks(run, top=3))
    same(found["uncertainty"], hk.uncertainty(run, pos=-1))
    same(found["surprisal"], hk.surprisal(run, top=2))
    same(found["direct"], hk.direct_logits(run, first, against=second))
    same(
        found["attribution"],
        hk.token_attribution(llama, MILK, hk.metrics.logit_diff(first, second)),
    )
    pattern = hk.forward(llama, MILK, hk.capture("pattern", pos=-1), logits=False).stack("pattern")[
        :, 0, :, 0
    ]
    looked = found["attention"]
    assert [row["mean"] for row in looked] == pytest.approx(
        pattern.mean(dim=(0, 1)).tolist(), abs=1e-5
    )
    layer, head = map(int, looked[2]["head"].split("."))
    assert looked[2]["strongest"] == pytest.approx(pattern[layer, head, 2].item(), abs=1e-5)
    said = hookkit("scan", MILK).stdout
    commands = [
        shlex.split(line)[1:] for line in said.splitlines() if line.startswith("    hookkit ")
    ]
    assert len(commands) == 6
    for command in commands:
        short = [*command, *(["--max-new-tokens", "1"] if "--max-new-tokens" in command else [])]
        assert hookkit(*short).exit_code == 0, command


def test_the_page_of_a_scan_is_that_of_the_library_with_what_to_ask_next(hookkit, llama, tmp_path):
    assert hookkit("scan", MILK, "--out", str(tmp_path)).exit_code == 0
    of_library = hk.scan(llama, MILK).page()
    page = unescape((tmp_path / "report.html").read_text())
    for part in of_library.parts:
        if isinstance(part, str):
            assert part.lstrip("# ") in page
    assert "<h2>What to ask next</h2>" in page and "hookkit " in page
    for name in of_library.tables:
        assert (tmp_path / f"{name}.csv").is_file()


def test_a_sweep_is_csv_unless_another_form_is_asked_for(hookkit, llama, tmp_path):
    words = [
        "sweep",
        "ablations",
        MILK,
        "attn_out",
        "--token",
        " coffee",
        "--layer",
        "2",
        "--quiet",
    ]
    wanted = hk.ablations(
        llama, [MILK], "attn_out", hk.metrics.prob(" coffee"), layers=[2], progress=False
    )
    assert hookkit(*words).stdout == wanted.to_csv(index=False)
    same(json.loads(hookkit(*words, "--json").stdout), wanted)
    assert hookkit(*words, "--out", str(tmp_path / "a.csv")).exit_code == 0
    assert (tmp_path / "a.csv").read_text() == wanted.to_csv(index=False)


@pytest.mark.parametrize("suffix", ["csv", "json", "html", "md", "tex", ""])
def test_the_ending_of_the_file_says_the_form(hookkit, llama, tmp_path, suffix):
    path = tmp_path / "new" / (f"ranks.{suffix}" if suffix else "ranks")
    done = hookkit("ranks", MILK, "--top", "2", "--out", str(path))
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    begins = {
        "csv": "row,pos,token",
        "json": '[\n{"row": 0',
        "html": "<!doctype html>",
        "md": "| row |",
        "tex": r"\begin",
    }
    assert path.read_text().startswith(begins[suffix]) if suffix else (path / "ranks.csv").exists()
    assert hookkit("ranks", MILK, "--top", "2", "--out", str(path), "-q").stderr == ""
