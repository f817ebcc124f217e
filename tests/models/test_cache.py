"""The models on this machine: listed, found and removed, in folders of the test's own."""

import json

import huggingface_hub.constants
import pytest

from hookkit.errors import ModelNotFound
from hookkit.models import cache as stored

COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as the Hub's client makes one, with a model in two revisions, and a data set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path / "own"))
    for kind, name in (("models", "lab--small"), ("datasets", "lab--texts")):
        repo = tmp_path / "hub" / f"{kind}--{name}"
        (repo / "blobs").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMITS[0])
        for number, commit in enumerate(COMMITS if kind == "models" else ["c" * 40]):
            (repo / "blobs" / str(number)).write_bytes(b"x" * 200_000 * (number + 1))
            (repo / "snapshots" / commit).mkdir(parents=True)
            (repo / "snapshots" / commit / "model.safetensors").symlink_to(
                repo / "blobs" / str(number)
            )
    folder = tmp_path / "own" / f"{stored.DEFAULT}-01234567"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1_500_000)
    return tmp_path


def test_the_models_are_listed_by_revision(hub):
    table = stored.stored_models()
    assert list(table.columns) == ["model", "revision", "megabytes", "files", "used", "path"]
    assert table["model"].tolist() == [stored.DEFAULT, "lab/small", "lab/small"]
    assert sorted(table["megabytes"]) == [0.2, 0.4, 1.5]
    assert set(table["revision"]) == {"01234567", *COMMITS}


def test_a_revision_is_removed_or_all_of_a_model(hub):
    assert stored.remove_model("lab/small", COMMITS[1]) == 0.4
    assert stored.stored_models()["revision"].tolist() == ["01234567", COMMITS[0]]
    assert stored.remove_model("lab/small") == 0.2
    assert stored.remove_model(stored.DEFAULT) == 1.5
    assert stored.stored_models().empty
    with pytest.raises(ModelNotFound, match="the default model, .* is not kept on this machine"):
        stored.remove_model(stored.DEFAULT)


def test_what_is_not_there_cannot_be_removed(hub):
    with pytest.raises(
        ModelNotFound,
        match="no model 'lab/smal' is kept on this machine; did you mean 'lab/small'?",
    ):
        stored.remove_model("lab/smal")
    with pytest.raises(ModelNotFound, match="no model 'lab/small' of revision 'd'"):
        stored.remove_model("lab/small", "d")


def test_the_commands_list_and_remove_and_ask_first(hub, hookkit):
    table = stored.stored_models()
    assert json.loads(hookkit("models", "list", "--json").stdout) == table.to_dict("records")
    where = hookkit("models", "where").stdout
    assert str(hub / "hub") in where and str(hub / "own") in where
    refused = hookkit("models", "remove", "lab/small")
    assert (
        refused.exit_code == 2
        and "add --yes" in refused.stderr
        and len(stored.stored_models()) == 3
    )
    done = hookkit("models", "remove", "lab/small", "--yes")
    assert (
        done.exit_code == 0
        and "removed lab/small, 0.6 MB" in done.stderr
        and len(stored.stored_models()) == 1
    )


def test_nothing_is_there_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path / "own"))
    assert stored.stored_models().empty


def test_a_model_that_the_hub_does_not_give_is_said(hub, hookkit):
    done = hookkit("models", "fetch", "some-lab/no-such-model")
    assert done.exit_code == 2 and "'some-lab/no-such-model'" in done.stderr and not done.stdout
