"""What moved between two results, told cell by cell."""

import subprocess

import numpy as np
import pandas as pd
import pytest

import hookkit as hk
from hookkit.errors import BadHook
from hookkit.reports.results_diff import describe_changes

TABLE = pd.DataFrame({"token": [" a", " b"], "logit": [1.0, 2000.0], "rank": [1, 2]})


def only(before: pd.DataFrame, after: pd.DataFrame, **settings) -> dict:
    return hk.results.compare_results({"t": before}, {"t": after}, **settings).iloc[0].to_dict()


def test_a_table_is_the_same_as_itself():
    found = only(TABLE, TABLE.copy())
    assert found["same"] and found["moved"] == 0 and found["largest"] == 0 and found["cells"] == 6


def test_a_number_may_differ_by_the_tolerance_or_by_that_part_of_itself():
    near = TABLE.assign(logit=[1.00009, 2000.19])  # 9e-5 of 1, and 0.95e-4 of 2000
    found = only(TABLE, near)
    assert found["same"] and found["largest"] == pytest.approx(0.19) and found["column"] == "logit"
    far = TABLE.assign(logit=[1.00011, 2000.21])
    assert only(TABLE, far)["moved"] == 2
    assert only(TABLE, far, tolerance=1e-2)["same"]
    assert only(TABLE, near, tolerance=1e-6)["moved"] == 2


def test_a_text_that_differs_and_a_number_that_is_missing_or_infinite_moved():
    assert only(TABLE, TABLE.assign(token=[" a", " c"]))["moved"] == 1
    gone, endless = (TABLE.assign(logit=[1.0, value]) for value in (np.nan, -np.inf))
    assert only(TABLE, gone)["moved"] == 1 and only(TABLE, endless)["moved"] == 1
    assert only(gone, gone.copy())["same"] and only(endless, endless.copy())["same"]
    assert only(endless, TABLE)["moved"] == 1
    sure, unsure = TABLE.assign(sure=[True, True]), TABLE.assign(sure=[True, False])
    assert (
        only(sure, unsure)["moved"] == 1 and only(sure, unsure)["column"] == ""
    )  # which is of numbers
    assert (
        describe_changes(hk.results.compare_results({"t": TABLE}, {"t": gone}))
        == "t: 1 of 6 cells moved"
    )


def test_other_rows_columns_and_tables_are_named():
    before = {"a": TABLE, "b": TABLE, "c": TABLE, "e": TABLE, "f": TABLE}
    after = {
        "a": TABLE.head(1),
        "b": TABLE.drop(columns="rank"),
        "d": TABLE,
        "e": TABLE[TABLE.columns[::-1]],
        "f": TABLE,
    }
    found = hk.results.compare_results(before, after)
    assert found["table"].tolist() == ["a", "b", "c", "e", "f", "d"]
    assert describe_changes(found) == (
        "a: has 1 rows, and had 2; b: has other columns: rank; c: is gone; e: has its columns in another order; "
        "d: is new; 1 other tables are the same"
    )


def test_folders_are_compared_by_their_csv_files_in_folders_below_too(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep" / ".last").mkdir(parents=True)
        TABLE.to_csv(tmp_path / name / "deep" / "t.csv", index=False)
    TABLE.to_csv(
        tmp_path / "two" / "deep" / ".last" / "t.csv", index=False
    )  # of the run before: not compared
    found = hk.results.compare_results(tmp_path / "one", str(tmp_path / "two"))
    assert found["table"].tolist() == ["deep/t"] and found["same"].all()
    with pytest.raises(BadHook, match="there is no folder .*three.*name a folder of results"):
        hk.results.compare_results(tmp_path / "one", tmp_path / "three")


def test_a_folder_is_compared_with_what_git_has_of_it_also_when_it_is_gone(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    result = tmp_path / "results" / "oat"
    result.mkdir(parents=True)
    TABLE.to_csv(result / "t.csv", index=False)
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", "one")
    TABLE.assign(rank=[1, 3]).to_csv(result / "t.csv", index=False)
    for folder, within in ((result, tmp_path), ("results/oat", tmp_path), (".", result)):
        monkeypatch.chdir(within)
        assert hk.results.compare_results(f"{folder}@HEAD", folder)[
            ["table", "moved"]
        ].values.tolist() == [["t", 1]]
    (tmp_path / ".gitignore").write_text("long.csv\n")
    for name in ("long.csv", "short.csv"):
        TABLE.to_csv(result / name, index=False)
    news = hk.results.compare_results(f"{result}@HEAD", result)
    assert news[["table", "note"]].values.tolist() == [["t", ""], ["short", "is new"]]
    assert hk.results.changed_cells(f"{result}@HEAD", result)["table"].unique().tolist() == ["t"]
    (result / "long.csv").unlink()
    (result / "short.csv").unlink()
    monkeypatch.chdir(tmp_path)
    (result / "t.csv").rename(tmp_path / "t.csv")
    result.rmdir()
    assert hk.results.compare_results("results/oat@HEAD", {"t": TABLE})["same"].all()
    for wrong in ("results/oat@nothing", "results/none@HEAD"):
        with pytest.raises(BadHook, match="git has no 'results/(oat|none)' at"):
            hk.results.compare_results(wrong, tmp_path)


def test_the_cells_that_changed_are_named_the_largest_first():
    old = pd.DataFrame(
        {
            "token": [" a", "\n", " c"],
            "rank": [1, 2, 3],
            "prob": [0.5, 0.25, np.nan],
            "logit": [1e6, -np.inf, 3.0],
        }
    )
    new = old.assign(prob=[0.6, 0.25, 0.1], logit=[1e6 + 50, -np.inf, 4.0], rank=[1, 900, 3])
    found = hk.results.changed_cells({"t": old, "s": old}, {"t": new, "s": old})
    assert found[["cell", "column", "before", "after"]].values.tolist() == [
        ["line 2: token ' c'", "prob", "", "0.1"],
        [r"line 1: token '\n'", "rank", "2", "900"],
        ["line 2: token ' c'", "logit", "3", "4"],
        ["line 0: token ' a'", "prob", "0.5", "0.6"],
    ]
    assert found["change"].tolist() == pytest.approx([np.inf, 898, 1, 0.1])
    every = hk.results.changed_cells({"t": old}, {"t": new}, tolerance=0)
    assert len(every) == 5 and every["change"].iloc[-1] == 50


def test_lines_and_columns_that_only_one_side_has_are_named():
    new = TABLE.iloc[[1]].assign(logit=[2001.0], more=1).drop(columns="rank")
    found = hk.results.changed_cells({"t": TABLE}, {"t": new})
    assert found[["column", "before", "after"]].values.tolist() == [
        ["(column)", "rank", ""],
        ["(column)", "", "more"],
        ["(row)", "line 0: token ' a'", ""],
        ["logit", "2000", "2001"],
    ]
    assert hk.results.changed_cells({"t": TABLE}, {"t": TABLE}).empty


def test_settings_that_changed_are_named_also_against_a_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, settings in ((0, {"layer": 3, "prompt": "a"}), (1, {"layer": 4, "prompt": "a"})):
        with hk.record("one", seed=seed, settings=settings, replace=True) as results:
            results.table("t", TABLE)
        if not seed:
            for words in (
                ("init",),
                ("add", "."),
                ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", "a"),
            ):
                subprocess.run(["git", *words], check=True, capture_output=True)
    for before in ("one/.last", "one@HEAD"):
        found = hk.results.changed_settings(before, "one")
        assert found.values.tolist() == [["seed", "0", "1"], ["settings.layer", "3", "4"]]
    assert hk.results.changed_settings("one", "one").empty
    with pytest.raises(BadHook, match="git has no"):
        hk.results.changed_settings("one@nothing", "one")
