"""Models for the tests: tiny random ones of each family, made from their configs, and the default model itself.

All of them are read-only: a test that changes a model makes its own with `tiny`.
"""

import copy
import os
import signal
from collections.abc import Callable

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a worker for each core; the processes that tests start have one thread too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from served_models import (  # noqa: F401  fixtures of the session
    cached,
    model_folder,
    narrow,
    own_code,
    reference,
    served,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import hookkit as hk

os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # tests press Ctrl-C; a shell's background ignores it
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

TEXTS = [
    "I like oat milk in my coffee. The store is in the city of Paris, and Mary went to the store.",
    "When Mary and John went to the store, John gave a drink to Mary. The capital of France is Paris.",
    "We love deep learning; tea and coffee, milk and sugar: the quick brown fox jumps over the lazy dog!",
]
PROMPTS = [
    "I like oat milk in my",
    "Tea",
    "When Mary and John went to the store, John gave a drink to",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 320 tokens, without a pad token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def tiny(family: str) -> torch.nn.Module:
    """A random model of a family for a test that changes it: 3 layers, d_model 32, 4 heads; llama has 2 key-value heads."""
    return hk.tiny(family).model


FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer()


@pytest.fixture(scope="session", params=FAMILIES)
def lm(request: pytest.FixtureRequest, small_tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    """A tiny random model of each family."""
    return hk.LM(tiny(request.param), small_tokenizer)


@pytest.fixture(scope="session")
def llama(small_tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    return hk.LM(tiny("llama"), small_tokenizer)


@pytest.fixture(scope="session")
def gpt2(small_tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    return hk.LM(tiny("gpt2"), small_tokenizer)


@pytest.fixture(scope="session")
def soft_capped(small_tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    """A model whose logits stay between -5 and 5."""
    return hk.tiny("gemma2", tokenizer=small_tokenizer, config={"final_logit_softcapping": 5.0})


@pytest.fixture(scope="session")
def smol() -> hk.LM:
    """The default model."""
    return hk.load(device="cpu")


@pytest.fixture
def hookkit(llama: hk.LM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line in this process, piped, with a tiny model as its default."""
    real = hk.load
    monkeypatch.setattr(
        "hookkit.models.loading.load",
        lambda *name, **words: real(*name, **words) if name or words else llama,
    )

    def run(*words: str, given: str = "") -> Result:
        from hookkit.cli import app

        return CliRunner().invoke(app, words, input=given, prog_name="hookkit")

    return run


def hooks_on(model: torch.nn.Module) -> dict[str, list[object]]:
    """Every hook and every attribute of its own that could stand in for a method, by module."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    found = {}
    for path, module in model.named_modules():
        mine = [list(getattr(module, kind).items()) for kind in kinds]
        found[path] = [
            mine,
            sorted(name for name, value in module.__dict__.items() if callable(value)),
        ]
    return found


@pytest.fixture(autouse=True)
def every_model_is_left_as_found(request: pytest.FixtureRequest):
    """No test may leave a hook behind on a shared model, or take one away."""
    names = [
        name
        for name in ("lm", "llama", "gpt2", "soft_capped", "smol")
        if name in request.fixturenames
    ]
    shared = [request.getfixturevalue(name).root for name in names]
    before = [copy.copy(hooks_on(model)) for model in shared]
    yield
    assert [hooks_on(model) for model in shared] == before, (
        "a hook was left on a model, or a method replaced"
    )
