"""Every public function that takes an LM, with a served one: it works, or says why it cannot."""

import inspect
import json

import pytest
import torch
from served_models import PROMPTS, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

P = PROMPTS[0]
CLEAN, CORRUPTED = PROMPTS[3], "The capital of"
IDS, OTHER_IDS = [5, 6, 7, 8], [5, 6, 9, 8]
WORKS = {
    "hk.generate": "hk.generate(lm, P, max_new_tokens=2)",
    "hk.harvest": "hk.harvest(lm, [P], 'z.0', folder, progress=False)",
    "hk.mean_difference": "hk.mean_difference(lm, [P], [CLEAN], 'resid_post.1')",
    "hk.principal_direction": "hk.principal_direction(lm, [P, CLEAN], [CORRUPTED, 'Tea'], 'resid_post.1')",
    "hk.parse_hook": "hk.parse_hook('ablate:z.1.2', lm=lm)",
    "hk.load_hooks": "hk.load_hooks(hooks_file, lm=lm)",
    "hk.stats.activation_statistics":
        "hk.stats.activation_statistics(lm, [P], 'z.0', progress=False)",
    "lm.describe": "lm.describe()",
    "lm.repr": "repr(lm), lm._repr_html_()",
    "hk.shift_report": "hk.shift_report(lm, P, STEER)",
    "hk.patchscope": "hk.patchscope(lm, P, max_new_tokens=2)",
    "hk.check_laws": "hk.check_laws(lm)",
    "hk.load_vector": "hk.load_vector(lm, vector_file)",
    "hk.record": "hk.record(folder, lm=lm)",
    "hk.mlp_out": "hk.forward(lm, P, hk.capture('mlp_out'), logits=False)",
}  # fmt: skip
REFUSED = {
    "hk.forward": "hk.forward(lm, P)",
    "hk.ablations": "hk.ablations(lm, P, 'mlp_out', PROB)",
    "hk.attach": "hk.attach(lm, STEER).__enter__()",
    "hk.attribution": "hk.attribution(lm, IDS, OTHER_IDS, 'z', PROB)",
    "hk.attribution_graph": "hk.attribution_graph(lm, P)",
    "hk.bake": "hk.bake(lm, hk.scale('mlp_out.1', 0.5))",
    "hk.causal_tracing": "hk.causal_tracing(lm, CLEAN, 'capital', PROB)",
    "hk.compare_generations": "hk.compare_generations(lm, P, STEER, max_new_tokens=2)",
    "hk.dose_response": "hk.dose_response(lm, P, VECTOR, PROB)",
    "hk.edge_attribution": "hk.edge_attribution(lm, IDS, OTHER_IDS, PROB)",
    "hk.edge_mask": "hk.edge_mask(lm, IDS, OTHER_IDS, PROB, steps=1)",
    "hk.feature": "hk.feature(lm.with_dictionaries(dictionary, check=False), [P], 'feat.mlp_out.1.2')",
    "hk.fit_jacobian": "hk.fit_jacobian(lm, ['tea ' * 60], layers=1, progress=False)",
    "hk.fit_subspace": "hk.fit_subspace(lm, pairs, 'resid_post.1', 1)",
    "hk.fit_vector": "hk.fit_vector(lm, P, ' tea', 'resid_post.1', steps=1)",
    "hk.gradients": "hk.gradients(lm, P, PROB, 'z')",
    "hk.head_scores": "hk.head_scores(lm, n=2, length=25)",
    "hk.logit_lens": "hk.logit_lens(lm, P)",
    "hk.logit_path": "hk.logit_path(lm, P)",
    "hk.model_diff": "hk.model_diff(reference, lm, P)",
    "hk.ov": "hk.ov(lm, 0, 0)",
    "hk.qk": "hk.qk(lm, 0, 0)",
    "hk.patching": "hk.patching(lm, IDS, OTHER_IDS, 'resid_post', PROB)",
    "hk.path_patching": "hk.path_patching(lm, IDS, OTHER_IDS, PROB)",
    "hk.scan": "hk.scan(lm, P)",
    "hk.stream": "list(hk.stream(lm, P, max_new_tokens=2))",
    "hk.sweep": "hk.sweep(lm, P, {'layer': [0, 1]}, by_layer, PROB)",
    "hk.sweep_plan": "hk.sweep_plan(lm, P, {'layer': [0, 1]}, by_layer, PROB)",
    "hk.token_attribution": "hk.token_attribution(lm, P, PROB)",
    "hk.token_losses": "hk.token_losses(lm, [P])",
    "hk.token_shifts": "hk.token_shifts(lm, [P], STEER, progress=False)",
    "hk.train_lens": "hk.train_lens(lm, ['tea ' * 900], steps=1)",
    "hk.unembedding": "hk.unembedding(lm, 5)",
    "hk.stats.evaluate": "hk.stats.evaluate(lm, 'hellaswag')",
    "trace": "hk.generate(lm, P, max_new_tokens=2, trace=hk.trace())",
    "lm.save": "lm.save(folder)",
    "the model": "lm.model(torch.tensor([[1, 2]]))",
    "a weight": "lm.root.get_input_embeddings().weight[3]",
    "direct logits": "hk.direct_logits(hk.forward(lm, P, hk.capture('resid_post'), logits='last'), 5)",
}  # fmt: skip
# They need other results first, take a run or a circuit, or draw prompts with the tokenizer.
ELSEWHERE = {
    "hk.compare_circuits", "hk.minimality", "hk.run_circuit", "hk.faithfulness", "hk.load_lens",
    "hk.load_probe", "hk.load_subspace", "hk.train_dictionary", "hk.fit_probe",
    "hk.logits_processor", "hk.doctor",
}  # fmt: skip


@pytest.fixture(scope="module")
def names(served, reference, tmp_path_factory) -> dict[str, object]:
    from test_vllm_dictionaries import dictionary

    folder = tmp_path_factory.mktemp("served")
    hooks_file = folder / "hooks.json"
    hooks_file.write_text(json.dumps([hk.ablate("z.1.2").to_json()]))
    pairs = [(IDS, [number, 6, 9, 8], " the") for number in range(8)]
    return {
        "hk": hk,
        "torch": torch,
        "lm": served,
        "reference": reference,
        "P": P,
        "IDS": IDS,
        "OTHER_IDS": OTHER_IDS,
        "CLEAN": CLEAN,
        "CORRUPTED": CORRUPTED,
        "PROB": hk.metrics.prob(5),
        "STEER": hk.steer("resid_post.1", torch.ones(128)),
        "VECTOR": hk.Vector("resid_post.1", torch.ones(128), norm=10.0),
        "by_layer": lambda layer: hk.ablate(f"mlp_out.{layer}"),
        "hooks_file": hooks_file,
        "vector_file": hk.mean_difference(reference, [P], [CLEAN], "resid_post.1")[0].save(
            folder / "vector.safetensors"
        ),
        "folder": folder / "results",
        "pairs": pairs,
        "dictionary": dictionary(hk.Site("mlp_out", 1)),
    }


@pytest.mark.parametrize("name", WORKS)
def test_it_works_where_a_model_is_served(name, names):
    assert eval(WORKS[name], dict(names)) is not None


@pytest.mark.parametrize("name", REFUSED)
def test_it_says_why_it_is_impossible_where_a_model_is_served(name, names):
    kinds = (hk.errors.Unsupported, hk.errors.MissingSite)
    with pytest.raises(kinds, match=r"vLLM"):
        eval(REFUSED[name], dict(names))


def test_every_function_that_takes_an_lm_is_in_a_table():
    functions = []
    for prefix, module in (("hk", hk), ("hk.stats", hk.stats)):
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            names = list(inspect.signature(value).parameters)
            if "lm" in names or name in ("attach", "model_diff"):
                functions.append(f"{prefix}.{name}")
    assert len(functions) > 40
    assert set(functions) - WORKS.keys() - REFUSED.keys() - ELSEWHERE == set()
