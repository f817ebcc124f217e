"""Families in vLLM: every site, the logits and the tokens are those of transformers."""

import pytest
from served_models import MEMORY, PROMPTS, compare, needs_vllm, serve

import hookkit as hk
from hookkit.runs.engines.vllm_probe import prove_engine
from hookkit.runs.engines.vllm_sites import PROVED_IN_OWN_CODE

pytestmark = needs_vllm

slow = pytest.mark.slow
WIDE_HEADS = {"head_dim": 32}
SERVED = [
    pytest.param("gpt_neox", "transformers", {}),
    pytest.param("gemma2", "transformers", WIDE_HEADS),
    pytest.param("mixtral", "transformers", {}, marks=slow),
    pytest.param("qwen2", "vllm", {}),
    pytest.param("qwen2", "transformers", {}, marks=slow),
    pytest.param("phi3", "vllm", {}, marks=slow),
    pytest.param("qwen3", "transformers", WIDE_HEADS, marks=slow),
    pytest.param("qwen3", "vllm", WIDE_HEADS, marks=slow),
    pytest.param("mistral", "transformers", {}, marks=slow),
    pytest.param("mistral", "vllm", {}, marks=slow),
    pytest.param("phi3", "transformers", {}, marks=slow),
    pytest.param("phi", "transformers", {}, marks=slow),
    pytest.param("stablelm", "transformers", {}, marks=slow),
    pytest.param("smollm3", "transformers", {}, marks=slow),
    pytest.param("olmo2", "transformers", {}, marks=slow),
    pytest.param("cohere", "transformers", {}, marks=slow),
    pytest.param("gemma3_text", "transformers", WIDE_HEADS, marks=slow),
]


@pytest.fixture
def serve_family(tmp_path, small_tokenizer):
    """A function that serves a tiny model of a family, and ends its engine."""
    engines = []

    def start(family, code, config):
        config = {"hidden_size": 128, **config}
        hk.tiny(family, tokenizer=small_tokenizer, config=config).save(tmp_path / family)
        lm = serve(tmp_path / family, model_impl=code, max_num_seqs=16, **MEMORY)
        engines.append(lm.engine)
        reference = hk.load(tmp_path / family, device="cpu", attn_implementation="eager")
        return lm, reference

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("family, code, config", SERVED)
def test_a_family_in_vllm_is_that_of_transformers(family, code, config, serve_family):
    lm, reference = serve_family(family, code, config)
    assert prove_engine(lm).broken.empty
    missing = {"scores", "pattern", "q_rot", "k_rot", "lm_head"}
    if family == "mixtral":
        missing |= {"router_logits", "experts", "expert_weights", "mlp_pre", "mlp_post"}
    assert set(reference.layout.names) - set(lm.layout.names) == missing
    compare(lm, reference, PROMPTS, hk.capture(lm.sites()))
    compare(lm, reference, PROMPTS, hk.scale("attn_out.1", -1.0, rows=[2]), hk.force(" t"))


def test_a_model_whose_logits_vllm_forgets_to_scale_raises_and_names_no_code_that_refuses_it(
    serve_family,
):
    lm, _ = serve_family("granite", "transformers", WIDE_HEADS)
    message = "the logits of the same last residual stream differ in row . by 3 of the largest"
    with pytest.raises(hk.errors.Unsupported, match=message) as error:
        hk.generate(lm, "Tea", max_new_tokens=1)
    assert "model_impl" not in str(error.value) and "Leave engine= out" in str(error.value)


@pytest.mark.parametrize(
    "family, config", [pytest.param("granite", WIDE_HEADS, marks=slow), ("stablelm", {})]
)
def test_own_code_that_is_not_like_llamas_is_refused_with_the_difference(
    family, config, serve_family
):
    words = "a block passes the residual stream on as one tensor"
    with pytest.raises(hk.errors.Unsupported, match=words) as error:
        serve_family(family, "vllm", config)
    assert "whose blocks are those of Llama" in str(error.value)


def test_the_families_for_which_vllms_own_code_is_advised_are_those_that_are_tested():
    tested = {param.values[0] for param in SERVED if param.values[1] == "vllm"}
    assert tested | {"llama"} == set(PROVED_IN_OWN_CODE)
