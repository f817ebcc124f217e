"""A hooked model on tasks of lm-evaluation-harness: the harness's own scores, and scores by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadHook, MissingExtra, NeverFired, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENTS = [
    {"prompt": "I like oat milk in my", "label": 1, "answer": " tea"},
    {"prompt": "In the morning I drink a cup of", "label": 0, "answer": " coffee"},
    {"prompt": "Mary went to", "label": 2, "answer": " the store"},
    {"prompt": "Tea or", "label": 1, "answer": " coffee"},
    {"prompt": "The capital of France is", "label": 2, "answer": " Paris"},
]
CHOICES = [" tea", " coffee with milk", " the store"]
CHOICE = """
task: drinks
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: [" tea", " coffee with milk", " the store"]
target_delimiter: ""
doc_to_target: label
metric_list: [{metric: acc}]
"""
TEXT = """
task: finish
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: bits_per_byte}]
"""


def test_without_the_harness_the_error_names_the_extra(llama, monkeypatch):
    monkeypatch.setattr("hookkit.tables.evaluation.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'hookkit\[eval\]'"):
        hk.stats.evaluate(llama, "drinks")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    pytest.importorskip("lm_eval")
    folder: Path = tmp_path_factory.mktemp("tasks")
    documents = folder / "documents.jsonl"
    documents.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\n"
    for text in (CHOICE, TEXT, ROLLING):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(f"{text}test_split: test\n{source}")
    return str(folder)


def score(lm: hk.LM, task: str, tasks: str, *hooks: hk.types.Hook, **settings) -> float:
    table = hk.stats.evaluate(lm, task, *hooks, include_path=tasks, **settings)
    assert list(table.columns) == ["task", "metric", "filter", "value", "stderr", "n"]
    (value,) = table["value"]
    assert list(table["n"]) == [len(DOCUMENTS)]
    return value


def harness_score(lm: hk.LM, task: str, tasks: str) -> float:
    """What the harness itself says of the plain model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    plain = HFLM(pretrained=lm.model, tokenizer=hk.tiny("llama", tokenizer=lm.tokenizer).tokenizer)
    outcome = lm_eval.simple_evaluate(
        plain, tasks=[task], task_manager=TaskManager(include_path=tasks), bootstrap_iters=0
    )
    scores = outcome["results"][task]
    return next(
        value for name, value in scores.items() if name.startswith(("acc,", "exact", "bits"))
    )


def answer_loglikelihood(lm: hk.LM, context: str, answer: str, hook=None) -> float:
    """By hand: one text in plain transformers, with a function on the logits of each step."""
    start = lm.tokenizer(context).input_ids
    ids = lm.tokenizer(context + answer).input_ids
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids[:-1]])).logits[0]
    total = 0.0
    for step, token in enumerate(ids[len(start) :]):
        scores = logits[len(start) + step - 1].clone()
        if hook is not None:
            hook(step, scores)
        total += float(scores.log_softmax(-1)[token])
    return total


def accuracy_by_hand(lm: hk.LM, hook=None) -> float:
    right = 0
    for document in DOCUMENTS:
        totals = [answer_loglikelihood(lm, document["prompt"], text, hook) for text in CHOICES]
        right += totals.index(max(totals)) == document["label"]
    return right / len(DOCUMENTS)


@pytest.mark.parametrize("task", ["drinks", "finish", "whole"])
@pytest.mark.parametrize("hooks", [(), (hk.scale("mlp_out.1", 1.0),)], ids=["no hook", "identity"])
def test_without_an_effect_the_score_is_that_of_the_harness(llama, tasks, task, hooks):
    value = score(llama, task, tasks, *hooks)
    assert value == pytest.approx(harness_score(llama, task, tasks), rel=1e-5)


def test_an_edit_of_one_step_changes_the_score_as_by_hand(llama, tasks):
    first = llama.tokenizer(" coffee").input_ids[0]

    def by_hand(step: int, logits: torch.Tensor) -> None:
        if step == 0:
            logits[first] += 30.0

    for batch_size in (1, 2, 8):
        hook = hk.boost(first, by=30.0, step=0)
        value = score(llama, "drinks", tasks, hook, batch_size=batch_size)
        assert value == accuracy_by_hand(llama, by_hand) == 2 / 5
    assert score(llama, "drinks", tasks) == accuracy_by_hand(llama)


def test_likelihoods_under_hooks_are_those_of_each_text_alone(llama, tasks):
    from hookkit.tables.evaluation import harness_model

    hooks = [
        hk.scale("mlp_out.1", -0.5, pos=hk.PROMPT),
        hk.steer("resid_post.0", torch.linspace(-1, 1, 32), pos=hk.GENERATED),
        hk.boost(300, by=2.0, step=[0, 1]),
        hk.ban(5, step=2),
    ]
    model = harness_model(llama, *hooks, batch_size=4)
    encode = llama.tokenizer
    requests, expected = [], []
    for document in DOCUMENTS:
        for choice in CHOICES:
            context = encode(document["prompt"]).input_ids
            ids = encode(document["prompt"] + choice).input_ids
            requests.append((("", ""), context, ids[len(context) :]))
            expected.append(alone(llama, context, ids[len(context) :]))
    scores = model._loglikelihood_tokens(requests)
    assert [value for value, _ in scores] == pytest.approx(expected, abs=1e-4)
    model.forwards.check_fired()


def alone(lm: hk.LM, context: list[int], answer: list[int]) -> float:
    """The same hooks by hand, with plain torch hooks, on one text."""
    start, ids = len(context), torch.tensor([[*context, *answer][:-1]])

    def scaled(module, args, output):
        output = output.clone()
        output[:, :start] *= -0.5
        return output

    def steered(module, args, output):
        output = output.clone()
        output[:, start:] += torch.linspace(-1, 1, 32)
        return output

    layers = lm.root.model.layers
    handles = [
        layers[1].mlp.register_forward_hook(scaled),
        layers[0].register_forward_hook(steered),
    ]
    with torch.no_grad():
        logits = lm.root(ids).logits[0, start - 1 :]
    for handle in handles:
        handle.remove()
    logits[:2, 300] += 2.0
    logits[2:3, 5] = -torch.inf
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum())


def test_texts_are_generated_under_the_hooks_in_padded_batches(llama, tasks):
    ids = llama.tokenizer(" coffee").input_ids
    assert len(ids) <= 3, "the task writes three tokens"
    hook = hk.force(hk.word(ids), step=0)
    rest = [hk.force("</s>", step=len(ids))] if len(ids) < 3 else []
    assert score(llama, "finish", tasks) == 0
    for batch_size in (1, 5):
        assert score(llama, "finish", tasks, hook, *rest, batch_size=batch_size) == 2 / 5


def test_the_model_the_tokenizer_and_random_numbers_are_left_as_found(llama, tasks):
    pad, state = llama.tokenizer.pad_token, torch.random.get_rng_state()
    score(llama, "drinks", tasks, hk.scale("mlp_out.1", 0.5))
    assert llama.tokenizer.pad_token == pad
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_has_no_meaning_on_a_task_is_refused(llama, tasks):
    with pytest.raises(BadHook, match="names rows, and the harness puts documents"):
        score(llama, "drinks", tasks, hk.scale("mlp_out.1", 0.5, rows=0))
    with pytest.raises(NeverFired, match="acted in no document"):
        score(llama, "drinks", tasks, hk.boost(7, by=1.0, step=50))
    with pytest.raises(Unsupported, match="a causal language model and its tokenizer"):
        hk.stats.evaluate(hk.LM(llama.model), "drinks")
    assert "lm_eval" in sys.modules
