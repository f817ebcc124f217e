"""Harvests: every row is what plain transformers has at its token, and no interruption leaves a trace."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import killing
import pytest
import torch
from by_hand import captured
from conftest import TEXTS, hooks_on, tiny
from killing import texts
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import hookkit as hk
from hookkit.data.harvest.stored_values import to_stored_dtype
from hookkit.errors import (
    BadHook,
    BadPrompt,
    DamagedHarvest,
    EmptySelection,
    HarvestChanged,
    MissingSite,
    NotCaptured,
    OutOfRange,
    Unsupported,
)

WORDS = [
    TEXTS[n % 3][3 * n % 17 : 3 * n % 17 + 1 + 7 * n % 45] for n in range(24)
]  # of 1 to 45 letters
SMALL = {"batch_tokens": 64, "shard_size": 60, "progress": False}


def harvest(lm, folder, given=None, sites="resid_post.1", **changes):
    return hk.harvest(lm, WORDS if given is None else given, sites, folder, **(SMALL | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_hand(lm, text, site: str) -> torch.Tensor:
    """What plain transformers has at a site for one text alone, [pos, ...]."""
    name, *layer = site.split(".")
    ids = lm.tokenizer.encode(text) if isinstance(text, str) else text
    return captured(lm.root, ids, name, int(layer[0]) if layer else None)[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# ---- what is kept


@pytest.mark.parametrize(
    "site", ["resid_post.1", "z.2", "mlp_post.0", "k.1", "embed", "final_norm", "lm_head"]
)
def test_every_row_is_what_plain_transformers_has_at_its_token(tmp_path, lm, site):
    found = harvest(lm, tmp_path, sites=site)
    alone = [by_hand(lm, text, site) for text in WORDS]
    ids = [lm.tokenizer.encode(text) for text in WORDS]
    close(found[site][:], torch.cat(alone))
    assert found["text"][:].tolist() == [n for n, row in enumerate(ids) for _ in row]
    assert found["pos"][:].tolist() == [place for row in ids for place in range(len(row))]
    assert found["token"][:].tolist() == [token for row in ids for token in row]
    assert (found.texts, found.left_out, found.finished, len(found.shards) > 3) == (
        24,
        0,
        True,
        True,
    )


def test_several_sites_and_one_head_come_from_the_same_forward(tmp_path, llama):
    found = harvest(llama, tmp_path, sites=["resid_post", "z.2", "z.0.3"])
    assert [str(site) for site in found.sites] == [
        "resid_post.0",
        "resid_post.1",
        "resid_post.2",
        "z.2",
        "z.0.3",
    ]
    assert found["z.2"].shape == (len(found), 4, 8)
    close(found["z.0.3"][:], torch.cat([by_hand(llama, text, "z.0")[:, 3] for text in WORDS]))
    assert torch.equal(found["z.2.1"][5:70], found["z.2"][5:70][:, 1])


@pytest.mark.parametrize(
    ("pos", "places"),
    [(-1, lambda n: [n - 1]), (0, lambda n: [0]), ([0, -1], lambda n: sorted({0, n - 1})),
     (slice(2, 5), lambda n: list(range(2, min(5, n)))), (slice(None, None, 3), lambda n: list(range(0, n, 3)))],
)  # fmt: skip
def test_only_the_positions_asked_for_are_kept(tmp_path, llama, pos, places):
    given = [text for text in WORDS if len(llama.tokenizer.encode(text)) > 1]
    found = harvest(llama, tmp_path, given, pos=pos)
    wanted = [by_hand(llama, text, "resid_post.1") for text in given]
    close(found["resid_post.1"][:], torch.cat([values[places(len(values))] for values in wanted]))
    assert found["pos"][:].tolist() == [place for values in wanted for place in places(len(values))]


def test_a_word_is_found_in_every_text(tmp_path, llama):
    given = ["tea and milk", "I like milk in my coffee, and sugar", "no milk"]
    found = harvest(llama, tmp_path, given, pos=hk.at("milk"))
    run = [hk.forward(llama, text, hk.capture("resid_post.1", pos=hk.at("milk"))) for text in given]
    close(found["resid_post.1"][:], torch.cat([each["resid_post.1"][0] for each in run]))


def test_the_model_runs_no_further_than_the_last_site(tmp_path, small_tokenizer):
    own = hk.LM(tiny("llama"), small_tokenizer)
    ran = []
    for number, block in enumerate(own.root.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    harvest(own, tmp_path, sites=["resid_post.0", "z.1"])
    assert set(ran) == {0}


def test_the_numbers_on_the_disk_are_the_models_rounded_once(tmp_path, llama):
    whole = harvest(llama, tmp_path / "whole")
    assert whole["resid_post.1"].dtype == torch.float32
    for name in ("bfloat16", "float16"):
        found = harvest(llama, tmp_path / name, dtype=name)
        assert torch.equal(
            found["resid_post.1"][:], whole["resid_post.1"][:].to(getattr(torch, name))
        )
    shard = load_file(tmp_path / "float16" / "00000.safetensors")["resid_post.1"]
    assert torch.equal(shard, found["resid_post.1"][: len(shard)])


def test_a_model_in_bfloat16_is_kept_in_bfloat16(tmp_path, small_tokenizer):
    own = hk.LM(tiny("llama").bfloat16(), small_tokenizer)
    found = harvest(own, tmp_path, WORDS[:3])
    assert found["resid_post.1"].dtype == torch.bfloat16
    assert torch.equal(found["resid_post.1"][-1], by_hand(own, WORDS[2], "resid_post.1")[-1])


def test_numbers_too_large_for_the_disk_are_refused(tmp_path, small_tokenizer):
    own = hk.LM(tiny("llama"), small_tokenizer)
    with torch.no_grad():
        own.root.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(
        BadHook, match="dtype='float16' holds numbers up to 65504, and resid_post.1 has"
    ):
        harvest(own, tmp_path, dtype="float16")
    assert harvest(own, tmp_path / "b", dtype=torch.bfloat16)["resid_post.1"][:].isfinite().all()


def test_the_number_that_is_too_large_is_named_by_its_size():
    site = hk.Site("resid_post", 1)
    with pytest.raises(BadHook, match=r"numbers up to 65504, and resid_post.1 has 100000: use"):
        to_stored_dtype(site, torch.tensor([[-1e5, 1.0]]), torch.float16)
    kept = to_stored_dtype(site, torch.tensor([[-65504.0, float("-inf")]]), torch.float16)
    assert kept.tolist() == [[-65504.0, float("-inf")]], "what was infinite is no loss"


def test_which_experts_were_chosen_stays_whole_numbers(tmp_path):
    mixture = hk.tiny("mixtral")
    found = harvest(
        mixture, tmp_path, texts(count=5), sites=["experts.1", "router_logits.1"], dtype="float16"
    )
    run = hk.forward(mixture, texts(count=5), hk.capture("experts.1"))
    assert found["experts.1"].dtype == torch.int64
    assert torch.equal(found["experts.1"][:], run["experts.1"][run.mask])
    assert found["router_logits.1"].dtype == torch.float16


# ---- where texts come from


def test_the_same_texts_give_the_same_rows_however_they_are_given(tmp_path, llama):
    (tmp_path / "t.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in WORDS)
    )
    ids = [llama.tokenizer.encode(text) for text in WORDS]
    ways = [
        WORDS, iter(WORDS), str(tmp_path / "t.txt"), tmp_path / "t.jsonl", [{"text": text} for text in WORDS], ids,
        (torch.tensor(row) for row in ids),
        [{"input_ids": [*row, 5], "attention_mask": [1] * len(row) + [0]} for row in ids],
    ]  # fmt: skip
    found = [harvest(llama, tmp_path / str(n), way) for n, way in enumerate(ways)]
    assert all(torch.equal(each["resid_post.1"][:], found[0]["resid_post.1"][:]) for each in found)
    assert all(files(tmp_path / "1")[name] == data for name, data in files(tmp_path / "0").items())


def test_a_model_without_a_tokenizer_takes_token_ids_only(tmp_path):
    bare = hk.tiny("llama")
    assert len(harvest(bare, tmp_path / "a", texts(count=3))) == sum(map(len, texts(count=3)))
    with pytest.raises(
        BadPrompt,
        match="text 0: 'I' is text, and this model came without a tokenizer: give token ids",
    ):
        harvest(bare, tmp_path / "b")


def test_what_is_no_stream_of_texts_is_refused_before_a_folder_is_made(tmp_path, llama):
    for given, words in (
        (
            "I like oat milk",
            r"'I like oat milk' is no file of texts: .* or for one text the list \[text\]",
        ),
        (7, "texts=7: give a list"),
        ({"text": WORDS}, "texts=a dict: give a list"),
    ):
        with pytest.raises(BadPrompt, match=words):
            harvest(llama, tmp_path / "none", given)
    for size in (0, -1):
        with pytest.raises(BadHook, match=f"shard_size={size}"):
            harvest(llama, tmp_path / "none", shard_size=size)
    assert not (tmp_path / "none").exists()


def test_a_stream_is_read_no_further_ahead_than_a_window(tmp_path, llama):
    ahead = []

    def stream():
        taken = 0
        for row in texts(count=400):
            ahead.append(taken - sum(json.loads(line)["tokens"] for line in lines_of(tmp_path)))
            taken += len(row)
            yield row

    harvest(llama, tmp_path, stream())
    assert max(ahead) < 3 * (
        60 + 24
    )  # a shard is 60 tokens and a text; one is written, one computed, one read


def test_a_window_ends_however_few_positions_are_wanted(tmp_path, llama):
    forwards, at = [], []

    def stream():
        for row in texts(count=400):
            at.append(len(forwards))
            yield row

    hook = llama.root.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        harvest(llama, tmp_path, stream(), pos=-1, shard_size=10_000)
    finally:
        hook.remove()
    tokens = [
        sum(len(row) for row, n in zip(texts(count=400), at, strict=True) if n == each)
        for each in set(at)
    ]
    assert max(tokens) < 16 * 64 + 24
    assert len(tokens) > 4


def test_texts_of_like_length_run_together(tmp_path, llama):
    given = [row for pair in zip([[5] * 30] * 20, [[6] * 2] * 20, strict=True) for row in pair]
    shapes = []
    hook = llama.root.register_forward_pre_hook(
        lambda _m, _a, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True
    )
    try:
        harvest(llama, tmp_path, given, batch_tokens=120, shard_size=10_000)
    finally:
        hook.remove()
    computed = sum(
        rows * width for rows, width in shapes[1:]
    )  # the first forward looks what the site holds
    assert computed == sum(map(len, given))
    assert max(rows * width for rows, width in shapes) <= 120


# ---- texts that do not fit


def test_a_text_that_cannot_be_read_is_named_and_nothing_done_is_lost(tmp_path, llama):
    good = texts()
    for number, (wrong, error, words) in enumerate((
        ([], BadPrompt, "text 90 is empty: the model needs at least one token .* on_error='skip' leaves out"),
        ([5] * 129, BadPrompt, "text 90 has 129 tokens, and 128 is the most that is read: say long='truncate'"),
        ([5, 320], BadPrompt, "text 90 has token id 320, and the vocabulary has ids 0 to 319"),
        ({"words": "tea"}, BadPrompt, "text 90 has 'words', and none of 'text', 'messages' and 'input_ids'"),
        (3.5, BadPrompt, "text 90, 3.5, is no text: give texts, chats, or rows of token ids"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        with pytest.raises(error, match=words):
            harvest(llama, folder, [*good[:90], wrong, *good[91:]])
        found = hk.open_harvest(folder)
        assert not found.finished
        assert 40 < found.texts <= 90
        assert sorted(path.name for path in folder.glob(".*")) == []
    undisturbed = harvest(llama, tmp_path / "undisturbed", good)
    harvest(llama, folder, good)
    assert files(folder) == files(undisturbed.shards.folder)


def test_what_stopped_a_harvest_can_be_allowed_and_it_goes_on(tmp_path, llama):
    given = [*texts()[:90], [5] * 129, [], *texts()[91:]]
    with pytest.raises(BadPrompt, match="text 90 has 129 tokens"):
        harvest(llama, tmp_path / "a", given)
    with pytest.raises(BadPrompt, match="text 91 is empty"):
        harvest(llama, tmp_path / "a", given, long="truncate")
    found = harvest(llama, tmp_path / "a", given, long="truncate", on_error="skip")
    harvest(llama, tmp_path / "b", given, long="truncate", on_error="skip")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert found.left_out == 1
    with pytest.raises(HarvestChanged, match="long 'truncate' there and 'split' now"):
        harvest(llama, tmp_path / "a", given, long="split", on_error="skip")


def test_a_long_text_is_cut_or_split_and_its_pieces_are_texts_of_their_own(tmp_path, llama):
    row = [7] + [(3 * n) % 320 for n in range(49)]
    cut = harvest(llama, tmp_path / "cut", [[9], row], context=20, long="truncate")
    close(cut["resid_post.1"][1:], by_hand(llama, row[:20], "resid_post.1"))
    split = harvest(llama, tmp_path / "split", [[9], row], context=20, long="split", shard_size=15)
    pieces = [[9], row[:20], row[20:40], row[40:]]
    close(
        split["resid_post.1"][:],
        torch.cat([by_hand(llama, piece, "resid_post.1") for piece in pieces]),
    )
    assert split["piece"][:].tolist() == [0] + [0] * 20 + [1] * 20 + [2] * 10
    assert split["pos"][:].tolist() == [0, *range(20), *range(20), *range(10)]
    assert split.tokens(-1) == tuple(row[40:])


def test_a_harvest_goes_on_in_the_middle_of_a_text_that_was_split(tmp_path, llama):
    given = [[9, 8], [(3 * n) % 320 for n in range(90)], [5] * 11, []]
    settings = {"context": 10, "long": "split", "on_error": "skip", "shard_size": 15}
    harvest(llama, tmp_path / "undisturbed", given, **settings)
    lines = lines_of(tmp_path / "undisturbed")
    assert len(lines) > 5
    for done in range(len(lines)):
        copy_of(tmp_path / "undisturbed", tmp_path / str(done))
        (tmp_path / str(done) / "index.jsonl").write_text(
            "".join(line + "\n" for line in lines[:done])
        )
        harvest(llama, tmp_path / str(done), iter(given), **settings)
        assert files(tmp_path / str(done)) == files(tmp_path / "undisturbed")


def test_every_piece_begins_with_the_token_that_begins_texts(tmp_path, llama):
    bos = llama.tokenizer.bos_token_id
    split = harvest(llama, tmp_path, [[bos, *range(10, 17)]], context=4, long="split")
    assert split["token"][:].tolist() == [bos, 10, 11, 12, bos, 13, 14, 15, bos, 16]


def test_texts_that_do_not_fit_are_left_out_and_counted(tmp_path, llama):
    given = [[5] * 3, [], [5] * 12, [5] * 129, [5] * 11, []]
    found = harvest(llama, tmp_path, given, pos=10, on_error="skip", shard_size=1)
    assert found["text"][:].tolist() == [2, 4]
    assert (found.texts, found.left_out) == (6, 4)
    with pytest.raises(
        OutOfRange, match="text 0: position 10 was asked for, and it has 3 tokens: 0 to 2"
    ):
        harvest(llama, tmp_path / "b", given, pos=10)
    with pytest.raises(OutOfRange, match="text 1: at.'milk'. was asked for"):
        harvest(llama, tmp_path / "c", ["milk", "tea"], pos=hk.at("milk"))


def test_a_stream_that_gives_no_row_is_refused(tmp_path, llama):
    with pytest.raises(EmptySelection, match="no text was given: the stream of texts is empty"):
        harvest(llama, tmp_path / "a", iter(()))
    with pytest.raises(EmptySelection, match="none of the 2 texts has a position at pos=9:"):
        harvest(llama, tmp_path / "b", [[1, 2], [3]], pos=slice(9, None))


# ---- killed, interrupted, damaged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_harvest_killed_ten_times_is_the_undisturbed_one_byte_for_byte(tmp_path):
    words = [sys.executable, killing.__file__, str(tmp_path), "0", "10"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == 10
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
    found = hk.open_harvest(tmp_path / "killed")
    rows = [(text, pos, token) for text, ids in enumerate(texts()) for pos, token in enumerate(ids)]
    assert (
        list(zip(*(found[name][:].tolist() for name in ("text", "pos", "token")), strict=True))
        == rows
    )


@pytest.fixture
def undisturbed(tmp_path, llama) -> Path:
    harvest(llama, tmp_path / "undisturbed", texts())
    return tmp_path / "undisturbed"


@pytest.mark.parametrize(
    "left",
    ["line cut off", "shard without its line", "no shard", "no end", "half a file", "nothing"],
)
def test_whatever_a_kill_leaves_behind_is_gone_on_from(tmp_path, llama, undisturbed, left):
    folder = tmp_path / "killed"
    copy_of(undisturbed, folder)
    lines = (folder / "index.jsonl").read_text().splitlines(keepends=True)
    keep = {"line cut off": [*lines[:6], lines[6][:40]], "no end": lines[:-1], "nothing": []}.get(
        left, lines[:6]
    )
    (folder / "index.jsonl").write_text("".join(keep))
    if left in ("no shard", "half a file"):
        for shard in sorted(folder.glob("*.safetensors"))[6:]:
            shard.unlink()
    if left == "half a file":
        (folder / ".00006.safetensors.0a1b2c3d.making").write_bytes(b"half")
    if left == "nothing":
        for path in folder.iterdir():
            path.unlink()
        (folder / ".harvest.json.0a1b2c3d.making").write_bytes(b"{")
    harvest(llama, folder, iter(texts()))
    assert files(folder) == files(undisturbed)


def test_a_shard_that_another_stream_left_behind_does_not_stay(tmp_path, llama, undisturbed):
    (undisturbed / "index.jsonl").write_text("\n".join(lines_of(undisturbed)[:-2]) + "\n")
    last = json.loads(lines_of(undisturbed)[-1])["text"]
    harvest(llama, undisturbed, texts()[: last + 1])
    harvest(llama, tmp_path / "short", texts()[: last + 1])
    assert files(undisturbed) == files(tmp_path / "short")


def copy_of(folder: Path, into: Path) -> None:
    into.mkdir()
    for name, data in files(folder).items():
        (into / name).write_bytes(data)


@pytest.mark.parametrize("forwards", [2, 7, 20])
def test_ctrl_c_leaves_no_hook_and_no_half_file_and_it_goes_on(
    tmp_path, small_tokenizer, undisturbed, forwards
):
    own = hk.LM(tiny("llama"), small_tokenizer)
    before, count = copy.copy(hooks_on(own.root)), [0]

    def interrupt(*_: object) -> None:
        count[0] += 1
        if count[0] == forwards:
            signal.raise_signal(signal.SIGINT)

    handle = own.root.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        harvest(own, tmp_path / "a", texts())
    handle.remove()
    assert hooks_on(own.root) == before
    done = {json.loads(line)["file"] for line in lines_of(tmp_path / "a")}
    assert {path.name for path in (tmp_path / "a").iterdir()} - done <= {
        "harvest.json",
        "index.jsonl",
    }
    harvest(own, tmp_path / "a", texts())
    assert files(tmp_path / "a") == files(undisturbed)


def lines_of(folder: Path) -> list[str]:
    path = folder / "index.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_harvest_is_checked_and_given_back_unread(tmp_path, llama, undisturbed):
    before = files(undisturbed)
    forwards = []
    hook = llama.root.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        again = harvest(llama, undisturbed, texts())
    finally:
        hook.remove()
    assert (again.finished, len(forwards), files(undisturbed)) == (
        True,
        1,
        before,
    )  # one looks what the site holds


def test_a_damaged_shard_is_found_and_made_again(llama, undisturbed):
    hk.open_harvest(undisturbed).verify()
    before = files(undisturbed)
    for number, change in (
        (3, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        (7, lambda data: data[:-9]),
    ):
        path = undisturbed / f"0000{number}.safetensors"
        path.write_bytes(change(path.read_bytes()))
    (undisturbed / "00009.safetensors").unlink()
    with pytest.raises(
        DamagedHarvest,
        match="00003.safetensors was changed; 00007.safetensors was changed; 00009.safetensors is missing",
    ):
        hk.open_harvest(undisturbed).verify()
    found = hk.open_harvest(undisturbed)
    with pytest.raises(
        DamagedHarvest, match="00007.safetensors, shard 7 of 28, cannot be read .*: call verify"
    ):
        found["resid_post.1"][:]
    (undisturbed / "00003.safetensors").unlink()
    harvest(llama, undisturbed, iter(texts()))
    assert files(undisturbed) == before


def test_a_shard_that_comes_out_otherwise_is_refused(small_tokenizer, undisturbed, monkeypatch):
    index = undisturbed / "index.jsonl"
    lines = index.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"sha256": "0" * 64})
    index.write_text("\n".join(lines) + "\n")
    (undisturbed / "00002.safetensors").unlink()
    with pytest.raises(
        HarvestChanged, match="00002.safetensors was missing and was made again, and is not what"
    ):
        harvest(hk.LM(tiny("llama"), small_tokenizer), undisturbed, texts())


def test_two_processes_do_not_write_one_folder(tmp_path, llama, undisturbed):
    from hookkit.files.atomic import lock_folder

    with (
        lock_folder(undisturbed, "is writing the harvest"),
        pytest.raises(Unsupported, match="another process is writing the harvest in 'undisturbed'"),
    ):
        harvest(llama, undisturbed, texts())
    assert not list(undisturbed.glob(".*"))


# ---- another harvest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": ["resid_post.1", "z.0"]}, "sites 'resid_post.1' there and 'resid_post.1, z.0' now"),
        ({"dtype": "float16"}, "sites.resid_post.1.dtype 'float32' there and 'float16' now"),
        ({"pos": -1}, "pos 'None' there and '-1' now"),
        ({"batch_tokens": 32}, "batch_tokens 64 there and 32 now"),
        ({"shard_size": 61}, "shard_size 60 there and 61 now"),
        ({"context": 100}, "context 128 there and 100 now. Give the same ones to go on, or another folder"),
    ],
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused_and_left_alone(llama, undisturbed, change, words):
    before = files(undisturbed)
    with pytest.raises(HarvestChanged, match=words):
        harvest(llama, undisturbed, texts(), **change)
    assert files(undisturbed) == before


def test_a_folder_of_another_model_is_refused(small_tokenizer, llama, gpt2, undisturbed):
    with pytest.raises(
        HarvestChanged, match="model.class 'LlamaForCausalLM' there and 'GPT2LMHeadModel' now"
    ):
        harvest(gpt2, undisturbed, texts())
    other = hk.LM(tiny("llama"), small_tokenizer)
    with torch.no_grad():
        other.root.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(
        HarvestChanged, match="other settings: model.weights_sha256 '?[0-9a-f]{8}… there and"
    ):
        harvest(other, undisturbed, texts())
    same = hk.LM(tiny("llama"), small_tokenizer)
    same.root.config.rms_norm_eps = 1e-3
    with pytest.raises(HarvestChanged, match="model.config_sha256"):
        harvest(same, undisturbed, texts())


def test_another_stream_is_refused(llama, undisturbed, tmp_path):
    given = texts()
    for folder in (undisturbed, tmp_path / "unfinished"):
        if folder != undisturbed:
            copy_of(undisturbed, folder)
            (folder / "index.jsonl").write_text("\n".join(lines_of(undisturbed)[:9]) + "\n")
        swapped = [given[1], given[0], *given[2:]]
        before = files(folder)
        with pytest.raises(
            HarvestChanged, match="texts 0 to . are not those that the folder was made from"
        ):
            harvest(llama, folder, swapped)
        with pytest.raises(
            HarvestChanged, match="made from .* texts or more, and only 12 were given"
        ):
            harvest(llama, folder, given[:12])
        assert files(folder) == before
    for others in ([*given, [5]], [*given[:-1], [5, 6]]):
        with pytest.raises(HarvestChanged):
            harvest(llama, undisturbed, others)


def test_a_folder_of_something_else_is_refused(tmp_path, llama):
    (tmp_path / "00000.safetensors").write_bytes(b"mine")
    with pytest.raises(
        DamagedHarvest, match="has shards and no harvest.json: give an empty folder"
    ):
        harvest(llama, tmp_path)
    assert files(tmp_path) == {"00000.safetensors": b"mine"}
    with pytest.raises(DamagedHarvest, match="'nowhere' has no harvest.json, so it is no harvest"):
        hk.open_harvest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"sites": "pattern.1"},
            BadHook,
            "pattern.1 has one for each query and key, more with every token",
        ),
        ({"sites": ["z.0", "scores"]}, BadHook, "scores.0 has one for each query and key"),
        ({"sites": "resid_post.9"}, OutOfRange, "the model has 3 layers"),
        ({"sites": "pos_embed"}, MissingSite, "this llama model has no 'pos_embed'"),
        ({"sites": [hk.module("model.rotary_emb", item=0), hk.module("model.norm")]}, None, ""),
        ({"sites": hk.module("model.layers.0.self_attn.q_proj")}, None, ""),
        ({"dtype": "int8"}, BadHook, "dtype='int8': values are kept as 'float32'"),
        ({"long": "cut"}, BadHook, "long='cut' is unknown: say 'error' or 'truncate' or 'split'"),
        ({"on_error": "drop"}, BadHook, "on_error='drop' is unknown: say 'error' or 'skip'"),
        (
            {"context": 129},
            BadHook,
            "context=129: give how many .* within the model's context, at most 128",
        ),
        ({"context": 1}, BadHook, "context=1: give how many tokens a row may have .*, at least 2"),
        (
            {"batch_tokens": 0},
            BadHook,
            "batch_tokens=0: give how many tokens run together, at least 1",
        ),
        ({"shard_size": -1}, BadHook, "shard_size=-1: give how many rows a shard has, at least 1"),
        ({"pos": hk.GENERATED}, BadHook, "a harvest reads texts and generates none"),
    ],
)
def test_what_cannot_be_harvested_is_refused_before_the_first_text(
    tmp_path, llama, change, error, words
):
    if error is None:
        assert len(harvest(llama, tmp_path / "a", **change)) == sum(
            len(llama.tokenizer.encode(t)) for t in WORDS
        )
        return
    with pytest.raises(error, match=words):
        harvest(llama, tmp_path / "a", **change)
    assert not (tmp_path / "a").exists()


# ---- reading


@pytest.fixture(scope="module")
def read(tmp_path_factory, llama):
    return harvest(llama, tmp_path_factory.mktemp("read"), texts(), sites=["resid_post.1", "z.2"])


def test_rows_are_read_by_number_by_slice_and_by_list(read):
    whole = torch.cat(
        [
            load_file(path)["resid_post.1"]
            for path in sorted(read.shards.folder.glob("*.safetensors"))
        ]
    )
    column = read["resid_post.1"]
    assert len(read) == len(column) == len(whole) == sum(map(len, texts()))
    assert torch.equal(column[:], whole)
    assert torch.equal(column[17], whole[17])
    assert torch.equal(column[-1], whole[-1])
    for rows in (
        slice(50, 300),
        slice(-70, None),
        slice(5, 5),
        slice(None, None, 7),
        slice(300, 50),
    ):
        assert torch.equal(column[rows], whole[rows])
    some = [1000, 3, 3, -2, 61]
    assert torch.equal(column[some], whole[some])
    assert torch.equal(column[torch.tensor(some)], whole[some])
    assert column[[]].shape == (0, 32)
    assert repr(read["z.2.1"]) == f"Column(z.2.1, [{len(whole)}, 8], float32)"


def test_what_is_read_is_a_copy(read):
    before = read["resid_post.1"][:3].clone()
    for rows in (0, slice(0, 3), [0, 1, 2]):
        read["resid_post.1"][rows].zero_()
    assert torch.equal(read["resid_post.1"][:3], before)
    read.verify()


def test_rows_that_are_not_there_are_refused(read):
    count = len(read)
    for rows in (count, -count - 1, [0, count]):
        with pytest.raises(
            OutOfRange, match=f"was asked for, and there are {count}: 0 to {count - 1}"
        ):
            read["pos"][rows]
    with pytest.raises(BadHook, match="give a number, a slice or a list of whole numbers"):
        read["pos"][0.5]
    with pytest.raises(
        NotCaptured,
        match="resid_post.2 was not harvested. There are 2 sites: resid_post.1, z.2; and",
    ):
        read["resid_post.2"]
    with pytest.raises(OutOfRange, match="z.2.4 was asked for, and z.2 has 4 heads: 0 to 3"):
        read["z.2.4"]


def test_every_row_knows_its_token_and_the_text_around_it(read):
    ids = texts()
    table = read.table([0, 700, -1])
    assert list(table.columns) == ["row", "text", "piece", "pos", "token_id"]
    for _, row in table.iterrows():
        assert read.tokens(row["row"]) == tuple(ids[row["text"]])
        assert ids[row["text"]][row["pos"]] == row["token_id"]
    assert len(read.table()) == len(read)


def test_batches_have_every_row_once_and_a_seed_shuffles_them(read):
    straight = list(read.batches(100, sites=["resid_post.1"]))
    assert torch.equal(
        torch.cat([batch["resid_post.1"] for batch in straight]), read["resid_post.1"][:]
    )
    assert set(straight[0]) == {"resid_post.1", "text", "piece", "pos", "token"}
    shuffled, again, other = (list(read.batches(100, seed=seed)) for seed in (0, 0, 1))
    rows = torch.cat([batch["resid_post.1"] for batch in shuffled])
    assert not torch.equal(rows, read["resid_post.1"][:])
    assert torch.equal(rows.sort(dim=0).values, read["resid_post.1"][:].sort(dim=0).values)
    assert all(torch.equal(a["z.2"], b["z.2"]) for a, b in zip(shuffled, again, strict=True))
    assert not torch.equal(shuffled[0]["z.2"], other[0]["z.2"])
    one = shuffled[3]
    row = (
        (read["text"][:] == one["text"][5])
        .logical_and(read["pos"][:] == one["pos"][5])
        .nonzero()
        .item()
    )
    assert torch.equal(one["resid_post.1"][5], read["resid_post.1"][row])
    assert len(list(read.batches(100, drop_last=True))) == len(read) // 100
    with pytest.raises(BadHook, match="a batch of 0 rows was asked for"):
        read.batches(0)


def test_a_table_of_some_rows_has_the_numbers_of_the_sites_that_are_asked_for(read):
    table = read.table([700, 3], sites=["z.2", "resid_post.1", "z.2.3"])
    assert table.columns[:6].tolist() == ["row", "text", "piece", "pos", "token_id", "z.2[0, 0]"]
    assert len(table.columns) == 5 + 32 + 32 + 8
    assert (
        table["z.2[3, 5]"].tolist()
        == read["z.2"][[700, 3]][:, 3, 5].tolist()
        == table["z.2.3[5]"].tolist()
    )
    assert table["resid_post.1[31]"].tolist() == read["resid_post.1"][[700, 3]][:, 31].tolist()
    with pytest.raises(NotCaptured, match="resid_post.0 was not harvested"):
        read.table([0], sites="resid_post.0")


def test_reading_from_front_to_back_keeps_few_shards_open(read):
    harvest = hk.open_harvest(read.shards.folder)
    assert len(harvest.shards) > 10
    opened = [len(harvest.shards._open) for _ in harvest.batches(50)]
    assert max(opened) <= 2
    harvest.statistics()
    assert len(harvest.shards._open) <= 2
    again = torch.cat([batch["z.2"] for batch in harvest.batches(50)])
    assert torch.equal(again, read["z.2"][:])


def test_torchs_own_loader_reads_a_column(read):
    loaded = torch.cat(list(DataLoader(read["z.2"], batch_size=64)))
    assert torch.equal(loaded, read["z.2"][:])
    assert torch.equal(pickle.loads(pickle.dumps(read["z.2"]))[5:9], read["z.2"][5:9])


def test_a_harvest_is_read_while_it_is_made(tmp_path, llama):
    seen = []

    def stream():
        for number, row in enumerate(texts()):
            if number in (60, 120):
                now = hk.open_harvest(tmp_path)
                seen.append((now.finished, now["token"][:].tolist()))
                assert "unfinished" in repr(now)
            yield row

    found = harvest(llama, tmp_path, stream())
    assert "unfinished" not in repr(found)
    tokens = found["token"][:].tolist()
    assert 0 < len(seen[0][1]) < len(seen[1][1]) < len(tokens)
    assert all(not finished and tokens[: len(some)] == some for finished, some in seen)


def test_a_line_shows_how_far_it_is_and_can_be_silenced(tmp_path, llama, capsys):
    harvest(llama, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    harvest(llama, tmp_path / "b", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "24/24" in err
    assert "tokens/s" in err


def test_a_stream_without_end_is_harvested_as_far_as_one_likes(tmp_path, llama):
    def endless():
        while True:
            yield [5, 6, 7]

    assert len(harvest(llama, tmp_path, islice(endless(), 50))) == 150
