"""A scan: its tables against the functions that have them alone, in a batch and with hooks."""

import pandas as pd
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadPrompt, NotOneToken, OutOfRange
from hookkit.reports.comparison_page import name_prompt

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12]]
NAMES = [
    "summary",
    "ranks",
    "uncertainty",
    "lens",
    "direct",
    "surprisal",
    "attention",
    "attribution",
]


def row_of(table: pd.DataFrame, row: int) -> pd.DataFrame:
    return table[table["row"] == row].drop(columns="row").reset_index(drop=True)


def test_a_prompt_in_a_batch_is_scanned_as_it_is_alone(llama):
    batch = hk.scan(llama, ROWS, watch=11)
    assert list(batch.tables) == NAMES and not batch.missing
    for row, ids in enumerate(ROWS[:2]):
        alone = hk.scan(llama, [ids], watch=11)
        for name, table in batch.tables.items():
            pd.testing.assert_frame_equal(
                row_of(table, row), row_of(alone.tables[name], 0), rtol=1e-3, atol=1e-5
            )


def test_the_summary_has_the_numbers_of_plain_torch(llama):
    look = hk.scan(llama, ROWS)
    for row, ids in enumerate(ROWS):
        with torch.no_grad():
            logits = llama.model(torch.tensor([ids])).logits[0, -1].double()
        probs, order = logits.softmax(-1).sort(descending=True)
        line = look.summary.iloc[row]
        assert (line["token_id"], line["token"]) == (int(order[0]), llama.string(int(order[0])))
        assert line["top2"] == llama.string(int(order[1]))
        assert line["prob"] == pytest.approx(probs[0].item(), abs=1e-5)
        assert line["entropy"] == pytest.approx(float(-(probs * probs.log()).sum()), abs=1e-4)
        parts = row_of(look.tables["direct"], row)
        assert parts["logit"].sum() == pytest.approx(
            (logits[order[0]] - logits[order[1]]).item(), abs=1e-3
        )
        assert line["component"] == parts.loc[parts["logit"].idxmax(), "component"]
        given = row_of(look.tables["attribution"], row)
        assert line["input_token"] == given.loc[given["attribution"].idxmax(), "token"]
        assert line["since"] is not None
        assert row_of(look.tables["attention"], row)["mean"].sum() == pytest.approx(1, abs=1e-5)


def test_hooks_act_on_all_tables_and_what_is_missing_has_a_reason(llama):
    hooks = [hk.ban(7, rows=1), hk.ablate("attn_out.1")]
    look = hk.scan(llama, ROWS, *hooks)
    run = hk.forward(llama, ROWS, *hooks)
    pd.testing.assert_frame_equal(look.tables["ranks"], hk.ranks(run, top=5))
    pd.testing.assert_frame_equal(look.tables["uncertainty"], hk.uncertainty(run, pos=-1))
    assert "leave the hooks out" in look.missing["attribution"]
    assert "attribution" not in look.tables and "input_token" not in look.summary
    short = hk.scan(llama, [[5]])
    assert "no token that logits predict" in short.missing["surprisal"]
    gpt = hk.scan(hk.tiny("mamba"), ROWS[:2])
    assert "attention" in gpt.missing and "ranks" in gpt.tables and repr(gpt)


def test_the_page_of_a_scan_has_each_prompt_and_all_tables(llama, tmp_path):
    look = hk.scan(llama, [*PROMPTS] * 4)
    page = look.write(tmp_path)
    html = page.read_text()
    assert page.name == "report.html" and html.count("What comes next") == 10
    for name in NAMES:
        table = hk.results.read_table(tmp_path / f"{name}.csv")
        assert len(table) == len(look.tables[name]), name
    ranks = hk.results.read_table(tmp_path / "ranks.csv")
    assert ranks["token"].tolist() == look.tables["ranks"]["token"].tolist()
    assert (tmp_path / "lens_0_figure.png").is_file()


def test_the_figures_of_a_scan_name_the_prompt_and_its_tokens(llama):
    look = hk.scan(llama, PROMPTS)
    for row, text in enumerate(PROMPTS):
        figures = {section.name: section.figure for section in look.sections(row)}
        drawn = figures["lens"]()
        last = llama.string(llama.tokenizer.encode(text)[-1])
        labels = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
        assert [label.rpartition("  ")[0] for label in labels] == [repr(last)]
        assert any(text in words.get_text() for words in drawn.texts)


def test_a_chat_is_named_by_its_end_in_one_line(llama, monkeypatch):
    lines = ["<s>system", "You are terse." * 9, "</s>", "<s>user", "What should I drink?</s>"]
    name = name_prompt(llama, "\n".join(lines))
    assert name.endswith("user What should I drink?") and len(name) == 80
    assert "\n" not in name and "s>" not in name
    assert name_prompt(llama, "I like\noat milk") == "I like oat milk"
    assert name_prompt(llama, "<s>") == "<s>"


def test_a_scan_refuses_what_it_cannot_take(llama):
    for arguments, error, words in (
        (("",), BadPrompt, "empty"),
        ((ROWS, "z.1"), Exception, "hook"),
        ((ROWS, {"top": 0}), OutOfRange, "top=0"),
        ((ROWS, {"watch": -1}), NotOneToken, "watch"),
    ):
        keywords = arguments[-1] if isinstance(arguments[-1], dict) else {}
        positional = arguments[:-1] if keywords else arguments
        with pytest.raises(error, match=words):
            hk.scan(llama, *positional, **keywords)
