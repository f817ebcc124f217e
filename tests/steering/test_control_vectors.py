"""Control vectors of llama.cpp: written, read by the gguf package, read back."""

import shutil

import gguf
import numpy as np
import pytest
import torch

import hookkit as hk
from hookkit.errors import BadFile, BadHook, OtherModel, OutOfRange

HAPPY, SAD = ["I love it", "What a day"], ["I hate it", "A sad day"]


@pytest.fixture(scope="module")
def vectors(small_tokenizer) -> tuple[hk.LM, hk.types.Vectors]:
    lm = hk.tiny("llama", tokenizer=small_tokenizer)
    return lm, hk.mean_difference(lm, HAPPY, SAD, ["resid_post.1", "resid_post.2"])


def written(path, tensors, architecture="controlvector", **texts) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for name, text in texts.items():
        writer.add_string(name.replace("__", "."), text)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_vector_is_written_as_llama_cpp_reads_it_and_read_back_equal(vectors, tmp_path):
    lm, (vector, _) = vectors
    path = vector.save_gguf(tmp_path / "mood.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "tiny llama"
    assert reader.get_field("controlvector.layer_count").contents() == 1
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name) == ("direction.1", "F32")
    assert np.array_equal(tensor.data, vector.tensor.numpy())
    back = hk.load_vector(lm, path)
    assert torch.equal(back.tensor, vector.tensor)
    assert (back.site, back.norm, back.about) == (vector.site, vector.norm, dict(vector.about))


def test_the_vectors_of_several_blocks_are_one_file(vectors, tmp_path):
    lm, several = vectors
    path = several.save_gguf(tmp_path / "mood.gguf")
    names = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert list(names) == ["direction.1", "direction.2"]
    for layer, vector in zip((1, 2), several, strict=True):
        back = hk.load_vector(lm, path, layer=layer)
        assert torch.equal(back.tensor, vector.tensor) and back.site == vector.site
        assert back.norm == vector.norm
    with pytest.raises(BadHook, match="directions of the blocks 1, 2: say layer="):
        hk.load_vector(lm, path)
    with pytest.raises(BadHook, match="directions of the blocks 1, 2"):
        hk.load_vector(lm, path, layer=0)


def test_a_vector_that_llama_cpp_could_not_add_is_refused(vectors, tmp_path):
    lm, (vector, _) = vectors
    for site in ("resid_post.0", "resid_pre.1", "mlp_out.1", "attn_out.2", "embed"):
        other = hk.Vector(site, vector.tensor, 1.0)
        with pytest.raises(BadHook, match=f"a block from 1 on gives.*this vector is at {site}"):
            other.save_gguf(tmp_path / "no.gguf")
    module = hk.Vector(hk.module("model.norm"), vector.tensor, 1.0)
    with pytest.raises(BadHook, match="a block from 1 on"):
        module.save_gguf(tmp_path / "no.gguf")
    with pytest.raises(BadHook, match=r"two vectors at resid_post\.1"):
        hk.types.Vectors([vector, vector]).save_gguf(tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadHook, match="layer=1 chooses among directions"):
        hk.load_vector(lm, vector.save(tmp_path / "mood.safetensors"), layer=1)


def test_a_file_of_another_program_needs_any_model_and_counts_its_dose_in_its_own_length(
    vectors, tmp_path
):
    lm, _ = vectors
    direction = np.linspace(-1, 1, 32, dtype=np.float32)
    path = tmp_path / "theirs.gguf"
    written(path, {"direction.2": direction}, controlvector__model_hint="llama")
    with pytest.raises(OtherModel, match="says nothing of weights_sha256"):
        hk.load_vector(lm, path)
    vector = hk.load_vector(lm, path, any_model=True)
    assert vector.dose == pytest.approx(1.0)
    run = hk.forward(lm, "I love", vector.steer(scale=0.5), hk.capture("resid_post.2"))
    plain = hk.forward(lm, "I love", hk.capture("resid_post.2"))
    moved = run["resid_post.2"] - plain["resid_post.2"]
    torch.testing.assert_close(moved, torch.tensor(direction / 2).expand_as(moved))
    written(path, {"direction.3": direction})
    with pytest.raises(OutOfRange):
        hk.load_vector(lm, path, any_model=True)


def test_what_is_no_control_vector_is_no_vector(vectors, tmp_path):
    lm, (vector, _) = vectors
    ones = np.ones(32, dtype=np.float32)
    path = tmp_path / "file.gguf"
    for tensors in (
        {"direction.0": ones},
        {"blk.0.weight": ones},
        {"direction.1": ones.astype(np.float16)},
        {"direction.1": ones[None]},
    ):
        written(path, tensors)
        with pytest.raises(BadFile, match="no direction of a block from 1 on"):
            hk.load_vector(lm, path, any_model=True)
    written(path, {"direction.1": ones}, "llama")
    with pytest.raises(BadFile, match="its architecture is 'llama'"):
        hk.load_vector(lm, path, any_model=True)
    whole = vector.save_gguf(path).read_bytes()
    for damaged in (b"", b"GGUF", whole[: len(whole) // 2], whole[:60], b"no" + whole):
        path.write_bytes(damaged)
        with pytest.raises(BadFile):
            hk.load_vector(lm, path)
    shutil.rmtree(tmp_path)
