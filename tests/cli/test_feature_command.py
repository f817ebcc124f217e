"""hookkit feature: the tables and the page of the call."""

import json

import pytest
from conftest import TEXTS
from dictionaries import fitted

import hookkit as hk


@pytest.fixture
def folder(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hookkit.features.fit_to_model.TEXT", " ".join(TEXTS)[:200]
    )  # a short context
    fitted(llama, tmp_path / "sae", layer=1, half=8)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path


def test_the_command_gives_the_tables_and_the_page_of_the_call(hookkit, llama, folder):
    words = ["feature", "feat.resid_post.1.3", "--texts", str(folder / "texts.txt")]
    words += ["--dictionary", str(folder / "sae"), "--top", "2", "--quiet"]
    done = hookkit(*words, "--json")
    assert done.exit_code == 0, done.output
    lm = llama.with_dictionaries(hk.load_dictionary(folder / "sae"))
    report = hk.feature(lm, TEXTS, "feat.resid_post.1.3", top=2, progress=False)
    tables = json.loads(done.stdout)
    assert list(tables) == list(report.tables)
    assert [row["token"] for row in tables["logits"]] == report.tables["logits"]["token"].tolist()
    done = hookkit(*words, "--out", str(folder / "page"))
    assert done.exit_code == 0 and "passages" in (folder / "page" / "report.html").read_text()
    assert "density" in hookkit(*words).stdout


def test_what_is_no_file_or_no_feature_is_refused(hookkit, folder):
    words = ["--dictionary", str(folder / "sae")]
    done = hookkit("feature", "feat.resid_post.1.3", "--texts", "nowhere.txt", *words)
    assert done.exit_code == 2 and "nowhere.txt" in done.stderr
    done = hookkit("feature", "z.1", "--texts", str(folder / "texts.txt"), *words)
    assert done.exit_code == 2 and "no feature" in done.stderr
