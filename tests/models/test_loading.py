"""hk.load: the default model, folders, GGUF files, and every way in which it can fail."""

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
