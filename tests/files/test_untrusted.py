"""Files of others: bombs, lies and names that lead elsewhere end in an error of a line, in a second."""

import json
import os
import struct
import time

import pandas as pd
import pytest
import torch

import hookkit as hk
from hookkit.errors import BadFile, BadHook, DamagedHarvest, HookkitError
from hookkit.files.atomic import format_csv
from hookkit.files.untrusted import (
    is_bare_name,
    parse_json,
    parse_yaml,
    path_inside,
    read_table,
    read_tensors,
)

DEEP = 100_000


def aliases(depth: int) -> str:
    """YAML in which each list has the one before nine times: 9 to the power of depth texts, in a few letters."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json", "[" * DEEP, "nested lists and mappings"),
        ("json", "[" * 70 + "]" * 70, "more than 64 nested lists"),
        ("json", '{"a":' * DEEP, "nested lists and mappings"),
        ("json", '[{"hook": "scale", "factor": NaN}]', "NaN is no number of JSON"),
        ("json", '[{"hook": "scale", "factor": -Infinity}]', "-Infinity is no number"),
        ("json", '[{"hook": "scale", "factor": 1e999}]', "larger than any number"),
        ("json", '[{"hook": "scale", "factor": ' + "9" * 5000 + "}]", "a whole number of 5000 digits"),
        ("json", '[{"hook": "scale", "hook": "ablate"}]', "the key 'hook' occurs twice"),
        ("json", "", "no JSON"),
        ("json", "[1]\0", "no JSON"),
        ("yaml", aliases(9), "anchor or alias"),
        ("yaml", "- &a {hook: *a}", "anchor or alias"),
        ("yaml", "[" * 3000 + "]" * 3000, "more than 64 nested lists"),
        ("yaml", "- " * 3000 + "x", "more than 64 nested lists"),
        ("yaml", "- {a: 1, a: 2}", "the key 'a' occurs twice"),
        ("yaml", "- !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("yaml", "- !!binary aGVsbG8=", "could not determine a constructor"),
        ("yaml", "- {1: 2}", "the key '1' is no text"),
        ("yaml", "- " + "9" * 5000, "a whole number of 5000 digits"),
        ("yaml", "- 1e999", "larger than any number"),
        ("yaml", "- 'tea\0'", "no YAML"),
        ("yaml", "{", "no YAML"),
        ("yaml", "- x\n" * 1_100_000, "more than 4 MB of YAML"),
    ],
)  # fmt: skip
def test_a_file_of_hooks_that_is_a_bomb_is_refused_in_a_line(tmp_path, kind, text, words):
    path = tmp_path / f"hooks.{kind}"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(BadHook) as raised:
        hk.load_hooks(path)
    assert time.process_time() - began < 2
    assert words in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        '{"hook":' + "[" * DEEP,
        '{"hook": "scale", "x": ' + '{"$hook":' * 2000,
        "ablate:z.1@pos=" + "-" * 5000 + "1",
        "ablate:z.1@pos=" + "(" * 500 + "1" + ")" * 500,
        "ablate:z.1@0:-",
        "ablate:z.1@-:3",
        "ablate:z.1@pos=" + "9" * 5000 + ":",
        "ablate:z.1" + "@" * 20_000,
        "ablate:z.1@pos=at()",
        "skip_block:" + "9" * 5000,
        "ablate:" + "z" * 100_000 + "%",
        "steer:" + "z" * 5000,
        "steer:a\0b",
        '{"hook": "ablate", "sites": {"$sites": ["z.1"]}, "to": {"$tensor": {"safetensors": "AAAA"}}}',
    ],
)
def test_a_text_of_a_hook_that_is_a_bomb_is_refused_in_a_line(text):
    began = time.process_time()
    with pytest.raises(HookkitError) as raised:
        hk.parse_hook(text)
    assert time.process_time() - began < 2 and len(str(raised.value)) < 200_000


def test_plain_yaml_means_what_json_does():
    text = "- {hook: x, a: 1, b: -2.5, c: true, d: null, e: [p, 'q'], f: 1:30, g: 2024-01-01, h: yes, i: 1e3, j: ''}"
    wanted = {
        "hook": "x",
        "a": 1,
        "b": -2.5,
        "c": True,
        "d": None,
        "e": ["p", "q"],
        "f": "1:30",
        "g": "2024-01-01",
    }
    assert parse_yaml(text, "it") == [{**wanted, "h": "yes", "i": 1000.0, "j": ""}]
    assert parse_yaml('- "ablate:z.9.3"\n- "force: coffee@0"\n', "it") == [
        "ablate:z.9.3",
        "force: coffee@0",
    ]


def test_what_cannot_be_read_is_said_of_every_kind_of_file(tmp_path):
    fifth = b"\xef\xbb\xbf[5]"  # with the mark of some editors
    (tmp_path / "marked.json").write_bytes(fifth)
    assert parse_json(fifth, "it") == [5]
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    for name in ("folder", "nowhere.yaml", "latin.json", "a\0b", "/dev/zero"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        path = name if name[0] == "/" or "\0" in name else tmp_path / name
        with pytest.raises(BadFile):
            hk.load_hooks(path)
        for read in (read_tensors, read_table):
            if name != "latin.json" and (name != "/dev/zero" or read is read_tensors):
                with pytest.raises(BadFile):
                    read(path)


def safetensors(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(words) if size is None else size) + words + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        safetensors(b"{", size=2**62),
        safetensors(b"[" * 1000),
        safetensors({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, b"\0" * 8),
        safetensors(
            {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8
        ),
        safetensors({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors({"__metadata__": {"vector": 5}}),
    ],
)
def test_a_safetensors_file_that_lies_is_refused_by_every_reader(tmp_path, llama, content):
    path = tmp_path / "lies.safetensors"
    path.write_bytes(content)
    for read in (
        hk.results.load_tensors,
        lambda path: hk.load_vector(llama, path),
        lambda path: hk.load_probe(llama, path),
        hk.load_lens,
        hk.results.load_statistics,
        lambda path: hk.parse_hook(f"steer:{path}", lm=llama),
    ):
        with pytest.raises(HookkitError) as raised:
            read(path)
        assert len(str(raised.value)) < 1000


def test_words_in_a_vector_a_lens_and_statistics_that_are_none_are_refused(tmp_path, llama):
    ones = {"vector": torch.ones(32)}
    for words in ("[" * DEEP, "[]", '{"site": 5, "norm": 1, "about": {}}', '{"site": "resid_post.1", "norm": 1}',
                  '{"site": "resid_post.1", "norm": "x", "about": {}}', '{"site": "nowhere.1", "norm": 1, "about": {}}',
                  '{"site": "resid_post.1", "norm": NaN, "about": {}}', '{"site": "resid_post.1", "norm": 1, "about": 3}'):  # fmt: skip
        hk.results.save_tensors(ones, tmp_path / "v.safetensors", about={"vector": words})
        with pytest.raises(HookkitError):
            hk.load_vector(llama, tmp_path / "v.safetensors", any_model=True)
        header = words.replace('"about"', '"bias": 0.5, "about"')
        hk.results.save_tensors(
            {"direction": torch.ones(32)}, tmp_path / "p.safetensors", about={"probe": header}
        )
        with pytest.raises(HookkitError):
            hk.load_probe(llama, tmp_path / "p.safetensors", any_model=True)
        hk.results.save_tensors(
            ones, tmp_path / "l.safetensors", about={"history": words, "about": words}
        )
        with pytest.raises(HookkitError):
            hk.load_lens(tmp_path / "l.safetensors")
        hk.results.save_tensors(ones, tmp_path / "s.safetensors", about={"statistics": words})
        with pytest.raises(HookkitError):
            hk.results.load_statistics(tmp_path / "s.safetensors")


# ---- a harvest whose files say something else


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest") / "h"
    hk.harvest(hk.tiny("llama"), [[5, 6, 7], [8, 9]], "resid_post.1", folder, progress=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(folder, files, name, change):
    folder.mkdir()
    for other, content in files.items():
        (folder / other).write_bytes(content)
    lines = files[name].decode().splitlines() if name.endswith("l") else [files[name].decode()]
    words = json.loads(lines[0])
    change(words)
    (folder / name).write_text("\n".join([json.dumps(words), *lines[1:]]) + "\n")


def put(name, value):
    return lambda words: words.update({name: value})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("index.jsonl", put("file", file)) for file in (
            "../00000.safetensors", "/etc/passwd", "..", "", "a/b", "..\\00000.safetensors", "C:00000.safetensors",
            "00000.safetensors\n", "00000.safetensors\0", 5, None, "harvest.json")],
        *[("index.jsonl", put(key, value)) for key in ("rows", "bytes", "text") for value in (-1, 1.5, True, "4", 2**70)],
        ("index.jsonl", put("rows", 4)),
        ("index.jsonl", put("more", 1)),
        ("index.jsonl", lambda words: words.pop("sha256")),
        ("harvest.json", put("format", 99)),
        ("harvest.json", put("sites", [])),
        ("harvest.json", put("model", 3)),
        ("harvest.json", put("sites", {"resid_post.1": {"shape": [31], "dtype": "float32"}})),
        ("harvest.json", put("sites", {"resid_post.1": {"shape": [32], "dtype": "float16"}})),
        ("harvest.json", put("sites", {"resid_post.1": {"shape": [32], "dtype": "load"}})),
        ("harvest.json", put("sites", {"resid_post.1": {"shape": [-32], "dtype": "float32"}})),
        ("harvest.json", put("sites", {"resid_post.2": {"shape": [32], "dtype": "float32"}})),
        ("harvest.json", put("sites", {"\x1b[2J": {"shape": [32], "dtype": "float32"}})),
        ("harvest.json", lambda words: words.pop("pos")),
    ],
)  # fmt: skip
def test_a_harvest_whose_files_say_something_else_is_damaged(tmp_path, harvested, name, change):
    changed(tmp_path / "h", harvested, name, change)
    with pytest.raises(DamagedHarvest) as raised:
        found = hk.open_harvest(tmp_path / "h")
        found[str(found.sites[0])][:]
        found.statistics()
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["harvest.json", "index.jsonl"])
@pytest.mark.parametrize(
    "content", [b"[" * DEEP + b"\n", b"[1]\n", b"\xff\n", b"{\n", b'"texts"\n', b"\0\n", b"NaN\n"]
)
def test_a_harvest_with_a_damaged_file_is_said_to_be_damaged(tmp_path, harvested, name, content):
    for other, whole in harvested.items():
        (tmp_path / other).write_bytes(content if other == name else whole)
    with pytest.raises(DamagedHarvest):
        hk.open_harvest(tmp_path)


@pytest.mark.parametrize("name", ["harvest.json", "index.jsonl", "00000.safetensors"])
def test_a_link_that_leads_out_of_a_harvest_is_not_read(tmp_path, harvested, name):
    folder = tmp_path / "h"
    folder.mkdir()
    for other, content in harvested.items():
        (folder / other).write_bytes(content)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedHarvest, match="a link that leads out of its folder"):
        hk.open_harvest(folder)["resid_post.1"][:]
    with pytest.raises(DamagedHarvest, match="a link that leads out of its folder"):
        hk.open_harvest(folder).verify()


def test_only_a_bare_name_is_one_in_a_folder(tmp_path):
    for name in (
        "../x",
        "/x",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "c:x",
        "a\nb",
        "a\0b",
        "\x1b[2J",
        "\u202ex",
        5,
        None,
    ):
        assert not is_bare_name(name)
        with pytest.raises(BadFile, match="no name of a file in that folder"):
            path_inside(tmp_path, name)
    assert path_inside(tmp_path, "00000.safetensors") == tmp_path / "00000.safetensors"
    (tmp_path / "loop").symlink_to("loop.csv")
    assert path_inside(tmp_path, "loop")  # a link that stays


# ---- results of others


@pytest.fixture
def result(tmp_path):
    one = tmp_path / "res" / "one"
    one.mkdir(parents=True)
    (one / "report.html").write_text("x")
    return one


@pytest.mark.parametrize(
    "about",
    ["[1]", "{", "[" * DEEP, '{"title": 5}', '{"answer": ["x"]}', "\xff", '{"a": 1, "a": 2}'],
)
def test_a_result_whose_about_is_none_is_said(result, about):
    (result / "about.json").write_bytes(about.encode("latin-1"))
    for look in (hk.results.list_results, hk.results.write_index):
        with pytest.raises(BadFile):
            look(result.parent)


def test_pictures_and_tables_from_outside_the_result_are_not_shown(result, tmp_path):
    import PIL.Image

    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    for name in ("../../outside.png", str(tmp_path / "outside.png"), 5, None):
        (result / "about.json").write_text(json.dumps({"files": [name]}))
        assert "data:image" not in hk.results.write_index(result.parent).read_text()
    (result / "linked.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(BadFile, match="leads out of its folder"):
        hk.results.write_index(result.parent)
    (result / "linked.png").unlink()
    (result / "not.png").write_text("no picture")
    with pytest.raises(BadFile, match="no picture in PNG"):
        hk.results.write_index(result.parent)
    (tmp_path / "t.csv").write_text("x\n1\n")
    (result / "t.csv").symlink_to(tmp_path / "t.csv")
    with pytest.raises(BadFile, match="leads out of its folder"):
        hk.results.compare_results(result, result)


def test_the_address_of_a_page_runs_nothing(tmp_path):
    for name in ("javascript:alert(1)", 'a"b', "a?b#c", "<script>"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.html").write_text("x")
    page = hk.results.write_index(tmp_path).read_text()
    assert (
        'href="javascript%3Aalert%281%29/report.html"' in page
        and 'href="a%3Fb%23c/report.html"' in page
    )
    assert "<script>" not in page and 'href="a"b' not in page


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n3,4,5\n", b"\xff\xfe,b\n1,2\n", b'"a'])
def test_a_table_that_cannot_be_read_is_said(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(BadFile, match="t.csv"):
        hk.results.compare_results(tmp_path, {"t": pd.DataFrame({"a": [1]})})


def test_a_line_of_a_file_of_texts_that_is_a_bomb_is_named(tmp_path, llama):
    (tmp_path / "texts.jsonl").write_text('"tea"\n' + "[" * DEEP + "\n")
    with pytest.raises(hk.errors.BadPrompt, match="text 1: line 2 of texts.jsonl is no JSON"):
        hk.harvest(llama, tmp_path / "texts.jsonl", "resid_post.1", tmp_path / "h", progress=False)


def test_messages_show_escapes_of_files_and_do_not_send_them(tmp_path):
    for letter in ("\x1b]0;x\x07", "\x9b2J", "\u202eabc", "\u2066"):
        error = BadFile(f"a{letter}b\nc\td")
        assert str(error).isprintable() or set(str(error)) - {"\n", "\t"} == {
            c for c in str(error) if c.isprintable()
        }
        assert str(error).endswith("b\nc\td") and letter[0] not in str(error)
    assert os.fspath(tmp_path)


# tokens that a reader of CSV takes for something else
TOKENS = [" coffee", "NA", "null", "nan", "None", "\n", "\r", "\r\n", '"', '""', "'", ",", "\t", " ", "\x00",
          "a\x00b", "\x1b[2J", "\ufffd", "<0xE2><0x80>", "1", " 2", "007", "1e5", "inf", "True", "\u202e",
          "\u2028", "\x85", "\ufeff", "#", "=1+1", "-"]  # fmt: skip


def test_a_table_of_tokens_is_read_back_as_it_was_written(tmp_path):
    count = len(TOKENS)
    table = pd.DataFrame(
        {
            "token": TOKENS,
            "top1_before": [None, *TOKENS[1:]],
            "note": [text if text.strip() else "x" for text in TOKENS],
            "rank": range(count),
            "prob": [0.1 + 0.2, *[float("nan")] * (count - 1)],
            "logit": [-float("inf")] * count,
            "top1_changed": [None, True, *[False] * (count - 2)],
        }
    )
    path = tmp_path / "t.csv"
    path.write_text(format_csv(table), encoding="utf-8", newline="")
    pd.testing.assert_frame_equal(read_table(path), table, check_exact=True)
    for tokens in (["1", "2"], ["NA", "NA"], ["True", "False"]):
        path.write_text(format_csv(pd.DataFrame({"token": tokens})), encoding="utf-8")
        assert read_table(path)["token"].tolist() == tokens
