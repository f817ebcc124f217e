"""A tiny random Llama in processes of vLLM, and on transformers, for the tests of engines.

They need the environment of `make test-vllm`; elsewhere these tests are skipped. What vLLM does differently from
transformers, and the test in tests/engines that holds hookkit to one meaning:

it changes transformers' classes in its process     processes: this process never imports vLLM
it keeps the keys of prompts, edited or not         batches: the tests with `cached`
a module is called once for each part of a prompt   batches: prompts that are read in parts; a request is read again
an exception inside a module stops it for ever      errors: an error arrives and the engine answers again
some modules are never called                       sites: every site is read and written; lm_head is refused
its logits processors see other logits              verbs: logits and tokens; batches: a forced token is chosen in every mode
its second model runner has other names             refused: another model runner is refused
compiled graphs do not call hooks                   refused: enforce_eager
it appends to the ids of requests                   batches: a prompt that is returned several times
a step cannot be stopped early                      errors: an error in a late step arrives
scores and patterns are in one kernel               sites: a site that the engine lacks is refused
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import hookkit as hk

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make test-vllm")

PROMPTS = [
    "I like oat milk in my",
    "Tea",
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
]
SMALL = {"dtype": "float32", "max_model_len": 128, "block_size": 32}
MEMORY = {"kv_cache_memory_bytes": 2**25}


def serve(folder: Path, **arguments) -> hk.LM:
    """The model of a folder in a process of its own."""
    return hk.load(folder, engine="vllm", **{**SMALL, **arguments})


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, small_tokenizer) -> Path:
    """A Llama whose heads are as wide as vLLM's attention on a CPU needs them."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    lm = hk.tiny("llama", tokenizer=small_tokenizer, config={"hidden_size": 128})
    with torch.no_grad():
        for name, weight in lm.root.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(0.3)  # wide heads make attention so sharp that it magnifies rounding
        # no row ends by itself, and so every hook that names a step acts
        lm.root.get_output_embeddings().weight[small_tokenizer.eos_token_id] = 0.0
    lm.save(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> hk.LM:
    """The model on transformers."""
    return hk.load(model_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def served(model_folder: Path):
    """The transformers backend, which reads all prompts in one step."""
    lm = serve(model_folder, max_num_seqs=16, **MEMORY)
    yield lm
    lm.engine.close()


@pytest.fixture(scope="session")
def own_code(model_folder: Path):
    """vLLM's own code of Llama."""
    lm = serve(model_folder, max_num_seqs=16, model_impl="vllm", **MEMORY)
    yield lm
    lm.engine.close()


@pytest.fixture(scope="session")
def narrow(model_folder: Path):
    """An engine of two slots that reads 16 tokens a step, and has pages for one long row."""
    lm = serve(
        model_folder, max_num_seqs=2, max_num_batched_tokens=16, num_gpu_blocks_override=5, **MEMORY
    )
    yield lm
    lm.engine.close()


@pytest.fixture(scope="session")
def cached(model_folder: Path):
    """An engine that keeps the keys of prompts."""
    lm = serve(model_folder, max_num_seqs=4, enable_prefix_caching=True, **MEMORY)
    yield lm
    lm.engine.close()


def difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert values.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(finite, values.isfinite())
    assert torch.equal(values[~finite], expected[~finite])
    return float((values - expected)[finite].abs().max() / expected[finite].abs().max())


def compare(lm: hk.LM, reference: hk.LM, prompts, *hooks, **arguments):
    """Both runs; their tokens are equal, and their logits and captures nearly so."""
    arguments = {"max_new_tokens": 8, **arguments}
    expected = hk.generate(reference, prompts, *hooks, **arguments)
    run = hk.generate(lm, prompts, *hooks, **arguments)
    assert run.generated == expected.generated
    assert torch.equal(run.tokens, expected.tokens)
    assert difference(run.logits, expected.logits) <= 1e-3
    assert run.sites == expected.sites
    for values, known in zip(run.captures.all, expected.captures.all, strict=True):
        assert (values.site, values.name, values.rows) == (known.site, known.name, known.rows)
        assert values.prompts == known.prompts
        assert torch.equal(values.positions, known.positions)
        assert difference(values.values, known.values) <= 1e-4, known
    return run, expected
