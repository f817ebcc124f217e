"""What hookkit writes: whole or not at all, through no link, over nothing that others wrote, with the bits of the umask."""

import json
import os
import re
import stat
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadFile, BadHook, HookkitError
from hookkit.files.atomic import (
    atomic_file,
    lock_folder,
    open_to_append,
    remove_leftovers,
    remove_partial_line,
    write_bytes,
    write_new,
    write_tensors,
)
from hookkit.reports.parts import Part

TABLE = pd.DataFrame({"x": [1.0]})


@pytest.fixture(scope="module")
def small() -> hk.LM:
    return hk.tiny("llama")


def harvested(lm, folder):
    hk.harvest(lm, [[5, 6, 7]], "resid_post.1", folder, progress=False)


def swept(lm, folder):
    grid = {"layer": range(2)}
    hk.sweep(
        lm,
        [[5, 6, 7]],
        grid,
        lambda layer: hk.ablate(hk.Site("z", layer)),
        hk.metrics.prob(3),
        save=folder,
        progress=False,
    )


def recorded(lm, folder):
    with hk.record(folder, seed=0) as results:
        results.table("t", TABLE)
        results.tensors("k", {"x": torch.ones(2)})


def reported(lm, folder):
    hk.report("A report", "words", Part(TABLE, "t")).write(folder)


def indexed(lm, folder):
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "report.html").write_text("x")
    hk.results.write_index(folder)


def vector_kept(lm, folder):
    hk.Vector("resid_post.1", torch.ones(32), norm=1.0).save(folder / "v.safetensors")


def tensors_kept(lm, folder):
    hk.results.save_tensors({"x": torch.ones(2)}, folder / "x.safetensors")


def statistics_kept(lm, folder):
    hk.stats.activation_statistics(lm, [[5, 6, 7]], "resid_post.1", progress=False).save(
        folder / "s.safetensors"
    )


WRITERS = {
    harvested: ("harvest.json", "index.jsonl", "00000.safetensors"),
    swept: ("sweep.json", "cells.jsonl", "table.csv"),
    recorded: ("about.json", "t.csv", "k.safetensors", "report.html"),
    reported: ("t.csv", "report.html"),
    indexed: ("index.html",),
    vector_kept: ("v.safetensors",),
    tensors_kept: ("x.safetensors",),
    statistics_kept: ("s.safetensors",),
}
PAIRS = [(write, name) for write, names in WRITERS.items() for name in names]
NAMES = [f"{write.__name__}-{name}" for write, name in PAIRS]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("write", WRITERS)
def test_files_have_the_names_that_they_should_and_the_bits_of_the_umask(small, tmp_path, write):
    before = os.umask(0o027)
    try:
        write(small, tmp_path / "new")
    finally:
        os.umask(before)
    for name in WRITERS[write]:
        assert stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) == 0o640, name
    assert not [name for name in contents(tmp_path) if name.endswith((".making", ".lock"))]


@pytest.mark.parametrize(("write", "name"), PAIRS, ids=NAMES)
def test_what_a_link_points_to_stays_as_it_is(small, tmp_path, write, name):
    for victim, text in ((tmp_path / "victim", "precious"), (tmp_path / "nowhere", None)):
        folder = tmp_path / f"folder_{victim.name}"
        folder.mkdir()
        (folder / name).symlink_to(victim)
        if text is not None:
            victim.write_text(text)
        try:
            write(small, folder)
        except HookkitError as error:
            assert any(
                word in str(error) for word in (name, "link", "has shards and no harvest.json")
            )
            assert (folder / name).is_symlink(), "what is refused is left as it was"
        else:
            assert not (folder / name).is_symlink() and (folder / name).stat().st_size
        assert (victim.read_text() if text else victim.exists()) == (text or False)


@pytest.mark.parametrize(("write", "name"), PAIRS, ids=NAMES)
def test_a_file_of_others_is_never_overwritten(small, tmp_path, write, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(HookkitError):
        write(small, tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    assert {path.name for path in tmp_path.iterdir()} <= {name, "one", *WRITERS[write]}


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_whose_name_a_file_has_is_said(small, tmp_path, write):
    (tmp_path / "file").write_text("mine")
    if write is not indexed:  # which makes no folder
        with pytest.raises(BadFile, match="is no folder|is a file, and a folder is meant"):
            write(small, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [write for write in WRITERS if write is not indexed])
def test_writing_a_second_time_replaces_what_hookkit_wrote(small, tmp_path, write):
    write(small, tmp_path)
    first = contents(tmp_path)
    write(small, tmp_path)
    again = {
        name: data for name, data in contents(tmp_path).items() if not name.startswith(".last")
    }
    assert {*again} == {*first}


def test_a_record_touches_nothing_that_it_did_not_write(tmp_path):
    (tmp_path / "data.csv").write_text("a\n1\n")
    for about in (
        {"name": "my project", "files": ["data.csv"]},
        {"ended": "stopped", "files": ["data.csv"]},
        {"ended": "finished", "made_by": "hookkit", "files": ["data.csv"]},
        {
            "ended": "stopped",
            "made_by": "hookkit",
            "files": ["data.csv"],
            "sha256": {"../data.csv": "0"},
        },
        {
            "ended": "stopped",
            "made_by": "hookkit",
            "files": ["data.csv"],
            "sha256": {"data.csv": "0" * 64},
        },
        [1],
    ):
        (tmp_path / "about.json").write_text(json.dumps(about))
        before = contents(tmp_path)
        with pytest.raises(BadFile):
            recorded(None, tmp_path)
        assert contents(tmp_path) == before, "nothing was written before it was refused"


def test_a_file_of_a_record_that_was_changed_since_is_kept_and_said(tmp_path):
    recorded(None, tmp_path)
    (tmp_path / "t.csv").write_text("x\n2.0\n")
    before = contents(tmp_path)
    with pytest.raises(BadFile, match=r"t\.csv, which no record wrote, or which was changed since"):
        recorded(None, tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "t.csv").rename(tmp_path / "mine.csv")
    recorded(None, tmp_path)
    assert (tmp_path / "mine.csv").read_text() == "x\n2.0\n"


def test_what_lies_in_the_folder_of_the_last_run_is_not_deleted(tmp_path):
    recorded(None, tmp_path)
    recorded(None, tmp_path)
    (tmp_path / ".last" / "note.txt").write_text("mine")
    recorded(None, tmp_path)
    assert (tmp_path / ".last" / "note.txt").read_text() == "mine"
    (tmp_path / ".last" / "t.csv").write_text("changed")
    with pytest.raises(BadFile, match=r"\.last/t\.csv"):
        recorded(None, tmp_path)
    assert (tmp_path / ".last" / "t.csv").read_text() == "changed"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("mine")
    for path in (tmp_path / ".last").iterdir():
        path.unlink()
    (tmp_path / ".last").rmdir()
    (tmp_path / ".last").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile, match=r"\.last"):
        recorded(None, tmp_path)
    assert (tmp_path / "elsewhere" / "precious").read_text() == "mine"


def test_a_record_in_the_middle_of_which_the_program_is_killed_is_made_again(tmp_path):
    results = hk.record(tmp_path, seed=0)
    results.__enter__()
    results.table("t", TABLE)
    (tmp_path / ".k.safetensors.0a1b2c3d.making").write_bytes(b"half")
    assert json.loads((tmp_path / "about.json").read_text())["ended"] == "running"
    recorded(None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "about.json",
        "t.csv",
        "k.safetensors",
        "report.html",
        "README.md",
    }


def test_a_report_replaces_its_own_files_and_no_changed_one(tmp_path):
    reported(None, tmp_path)
    hk.report("Another", Part(TABLE * 2, "t")).write(tmp_path)
    assert pd.read_csv(tmp_path / "t.csv")["x"].tolist() == [2.0]
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(BadFile, match="has t.csv"):
        reported(None, tmp_path)
    assert "Another" in (tmp_path / "report.html").read_text(), (
        "nothing was written before it was refused"
    )


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_part_whose_name_leaves_the_folder_is_refused(tmp_path, name):
    part = Part(TABLE, name)
    for report in (hk.types.Report("R", (part,)), hk.types.Report("R", (), data=(part,))):
        with pytest.raises(BadHook, match="cannot name a file"):
            report.write(tmp_path / "r")
    if name not in (".hidden", "a b"):
        with pytest.raises(BadHook, match="cannot name a file"):
            hk.types.Report("R", (), files={name: "x"}).write(tmp_path / "r")
    assert not [*tmp_path.iterdir()]


def test_a_harvest_deletes_no_file_that_only_looks_like_a_shard(small, tmp_path):
    harvested(small, tmp_path)
    lines = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_text("".join(lines[:-1]))
    hk.results.save_tensors({"weights": torch.ones(3)}, tmp_path / "99999.safetensors")
    (tmp_path / ".notes.making").write_text("mine")
    harvested(small, tmp_path)
    assert {"99999.safetensors", ".notes.making"} <= {*contents(tmp_path)}


def test_values_of_another_are_no_journal(small, tmp_path):
    (tmp_path / "cells.jsonl").write_text("[[0, 0, 0.5]]\n")
    with pytest.raises(BadFile, match=r"has a cells\.jsonl and no sweep\.json"):
        swept(small, tmp_path)
    (tmp_path / "cells.jsonl").unlink()
    swept(small, tmp_path)
    whole = (tmp_path / "cells.jsonl").read_text()
    for line in (
        "[[0, 0]]",
        "[[0, 0, 1, 2, 3]]",
        '[[0, 0, "x"]]',
        "[5]",
        "5",
        "[" * 10_000,
        "[[true, 0, 1]]",
    ):
        (tmp_path / "cells.jsonl").write_text(f"{whole}{line}\n")
        with pytest.raises(BadFile, match=r"line \d+ of"):
            swept(small, tmp_path)
    (tmp_path / "cells.jsonl").write_text(whole)
    (tmp_path / "table.csv").write_text("mine")
    with pytest.raises(BadFile, match="not as the sweep wrote it"):
        swept(small, tmp_path)
    assert (tmp_path / "table.csv").read_text() == "mine"


# ---- one file


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_bytes(tmp_path / "f", b"before")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "f") as making:
        making.write_text("half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"f": b"before"}


def test_leftovers_are_removed_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / ".f.0a1b2c3d.making").write_text("left")
    (tmp_path / ".g.0a1b2c3d.making").write_text("left")
    (tmp_path / ".f.making").write_text("mine")
    with atomic_file(tmp_path / "f") as making:
        making.write_text("now")
        thread = threading.Thread(target=remove_leftovers, args=(tmp_path,))
        thread.start()
        thread.join()
        assert making.exists()
    assert contents(tmp_path) == {"f": b"now", ".f.making": b"mine"}


def test_the_bits_of_a_file_that_is_replaced_stay(tmp_path):
    (tmp_path / "f").write_text("x")
    (tmp_path / "f").chmod(0o604)
    write_bytes(tmp_path / "f", b"y")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o604


def test_a_name_that_is_taken_is_not_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(BadFile, match="exists already"):
            write_new(tmp_path / name, "x")
    assert not (tmp_path / "nowhere").exists() and (tmp_path / "file").read_text() == "mine"


def test_no_line_is_added_to_what_a_link_points_to_or_cut_off_there(tmp_path):
    (tmp_path / "victim").write_text("precious, without an end")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(BadFile, match="is a link"), open_to_append(tmp_path / "link"):
        pass
    with pytest.raises(BadFile, match="is a link"):
        remove_partial_line(tmp_path / "link")
    for lock in ("mine", None):
        (tmp_path / ".lock").unlink(missing_ok=True)
        (tmp_path / ".lock").write_text(lock) if lock else (tmp_path / ".lock").symlink_to(
            tmp_path / "victim"
        )
        with (
            pytest.raises(BadFile, match="not a lock of hookkit's"),
            lock_folder(tmp_path, "is writing"),
        ):
            pass
    assert (tmp_path / "victim").read_text() == "precious, without an end"


def test_the_words_about_tensors_stand_in_one_order(tmp_path):
    words = {f'word {n} é\n\t"\\\x1b': "x" * n for n in range(12)}
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"x": torch.arange(3)}, words)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    from safetensors import safe_open

    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == words and file.get_tensor("x").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.uint8]
)
def test_tensors_of_every_kind_are_what_safetensors_reads(tmp_path, dtype):
    from safetensors.torch import load_file

    given = torch.randint(0, 2, (3, 4, 5)).to(dtype)
    tensors = {
        "whole": given,
        "turned": given.transpose(0, 2),
        "one": given[0, 0, 0],
        "none": given[:0],
        "é\x1b": given,
    }
    write_tensors(tmp_path / "t", tensors, {"a": "b"})
    back = load_file(tmp_path / "t")
    assert all(
        torch.equal(back[name], tensor) and back[name].dtype == dtype
        for name, tensor in tensors.items()
    )


def test_no_other_file_of_the_package_writes():
    writing = re.compile(
        r"\.write_text\(|\.write_bytes\(|\bopen\([^)]*[\"'][wax]|save_file\(|\.to_csv\(path|\.savefig\(path"
    )
    allowed = {
        "models/cache.py": 1,
        "cli/output.py": 1,
        "models/engine.py": 1,
    }  # into a folder of its own that is renamed, a file that is made, the log of a process
    package, found = Path(hk.__file__).parent, {}
    for path in package.rglob("*.py"):
        if path.name == "atomic.py" or "docs" in path.parts:
            continue
        lines = [
            line
            for line in path.read_text().splitlines()
            if writing.search(line) and ">>>" not in line
        ]
        if lines:
            found[path.relative_to(package).as_posix()] = len(lines)
    assert found == allowed


# ---- tensors kept whole


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "c": torch.randn(4, 4).T}
    tensors |= {"d": torch.tensor([], dtype=torch.int64), "e": torch.empty(0, 3)}
    path = hk.results.save_tensors(
        tensors, tmp_path / "deep" / "t.safetensors", about={"site": "resid_post.6"}
    )
    back = hk.results.load_tensors(path)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert [file.name for file in path.parent.iterdir()] == ["t.safetensors"]


def test_a_runs_captures_are_saved_by_site_and_name(tmp_path, lm):
    run = hk.forward(lm, PROMPTS, hk.capture("z.1"), hk.capture("resid_post.0", name="x"))
    back = hk.results.load_tensors(hk.results.save_tensors(run, tmp_path / "t.safetensors"))
    assert torch.equal(back["z.1"], run["z.1"])
    assert torch.equal(back["resid_post.0/x"], run["resid_post.0", "x"])


def test_nothing_to_save_is_refused(tmp_path, lm):
    with pytest.raises(BadHook, match="there are no tensors to save"):
        hk.results.save_tensors(hk.forward(lm, "Tea"), tmp_path / "t.safetensors")
