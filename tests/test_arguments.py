"""One reader for each kind of argument: hooks are checked however they are made, and an error's offers are accepted."""

import inspect
import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from conftest import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import hookkit as hk
from hookkit.arguments import _fitting_calls
from hookkit.errors import NotOneToken
from hookkit.hooks.serialization import HOOK_TYPES

ONES = torch.ones(32)
LENS = hk.fit_jacobian(hk.tiny("llama"), [list(range(3, 40))], tokens=[7, 9], progress=False)
WORDS = [word for text in TEXTS for word in re.findall(r"\w+", text)]

WHERE = {"$value": "Where", "pos": None, "rows": None, "step": 0}
NAN = {"$float": "nan"}
SPOILED = [
    # a hook, and fields that its function refuses
    (hk.force(7), {"margin": -5.0}),
    (hk.force(7), {"margin": NAN}),
    (hk.force(7), {"margin": "much"}),
    (hk.force(7), {"token": 5.5}),
    (hk.force(7), {"token": None}),
    (hk.force(7), {"token": True}),
    (hk.force(7), {"sites": {"$sites": ["z.1.0"]}}),
    (hk.force(7), {"sites": {"$sites": []}}),
    (hk.force(7), {"sites": {"$sites": ["logits", "logits"]}}),
    (hk.force(7), {"sites": None}),
    (hk.force(7), {"when": 5}),
    (hk.force(hk.word([7, 8])), {"where": {**WHERE, "step": None, "pos": 1}}),
    (hk.ban(5), {"tokens": []}),
    (hk.ban(5), {"tokens": [5.5]}),
    (hk.ban(5), {"tokens": 5.5}),
    (hk.restrict(5), {"tokens": [{"$value": "Word", "text": "tea", "exact": "no"}]}),
    (hk.restrict(5), {"tokens": [{"$value": "Word", "text": ""}]}),
    (hk.boost(5, by=1.0), {"by": NAN}),
    (hk.boost(5, by=1.0), {"by": [1.0, 2.0]}),
    (hk.cap(5, prob=0.5), {"prob": 1.5}),
    (hk.cap(5, prob=0.5), {"prob": None}),
    (hk.cap(5, prob=0.5), {"logit": 1.0}),
    (hk.swap(5, 6), {"b": 5}),
    (hk.set_rank(5, 1), {"rank": 0}),
    (hk.set_rank(5, 1), {"rank": 1.5}),
    (hk.toward("a", by=1.0), {"by": NAN}),
    (hk.toward("a", by=1.0), {"plausible": 1.5}),
    (hk.toward("a", by=1.0), {"source": "a"}),
    (hk.toward("a", by=1.0), {"source": {"$value": "OtherPrompts", "prompts": []}}),
    (hk.toward("a", by=1.0), {"source": {"$value": "OtherModel", "lm": "gpt2"}}),
    (hk.toward("a", by=1.0), {"sites": {"$sites": ["lm_head"]}}),
    (hk.scale("z.1", 2.0), {"factor": NAN}),
    (hk.scale("z.1", 2.0), {"factor": "abc"}),
    (hk.scale("z.1", 2.0), {"factor": None}),
    (hk.scale("z.1", 2.0), {"where": WHERE}),
    (hk.scale("z.1", 2.0), {"where": None}),
    (hk.scale("z.1", 2.0), {"where": {**WHERE, "step": None, "pos": 1.5}}),
    (hk.scale("z.1", 2.0), {"where": {**WHERE, "step": None, "rows": [-1]}}),
    (
        hk.scale("z.1", 2.0),
        {"where": {**WHERE, "step": None, "pos": {"$value": "At", "text": "", "which": None}}},
    ),
    (hk.scale("z.1", 2.0), {"where": {**WHERE, "step": None, "pos": {"$part": "middle"}}}),
    (hk.scale("logits", 2.0), {"where": WHERE}),
    (hk.scale("z.1", 2.0), {"sites": {"$sites": [5]}}),
    (hk.scale("z.1", 2.0), {"sites": {"$sites": ["zz.1"]}}),
    (hk.steer("resid_post.1", ONES), {"scale": NAN}),
    (hk.steer("resid_post.1", ONES), {"vector": 5}),
    (hk.steer("resid_post.1", ONES), {"vector": {"$value": "Constant", "tensor": 5}}),
    (
        hk.steer("resid_post.1", ONES),
        {"vector": {"$value": "Constant", "tensor": {"$tensor": {"safetensors": "AAAA"}}}},
    ),
    (
        hk.steer("resid_post.1", ONES),
        {"vector": {"$value": "Constant", "tensor": {"$tensor": {"safetensors": "?"}}}},
    ),
    (hk.steer("resid_post.1", ONES), {"vector": {"$value": "Constant", "tensor": {"$tensor": 5}}}),
    (hk.steer("resid_post.1", ONES), {"sites": {"$sites": ["pattern.1"]}}),
    (hk.project_out("resid_post.1", ONES), {"direction": None}),
    (hk.swap_concept(LENS, 7, 9, layers=[0]), {"vectors": None}),
    (
        hk.swap_concept(LENS, 7, 9, layers=[0]),
        {"sites": {"$sites": ["resid_post.0", "resid_post.1"]}},
    ),
    (hk.swap_concept(LENS, 7, 9, layers=[0]), {"sites": {"$sites": ["z.0"]}}),
    (hk.skip_block(1), {"sites": {"$sites": ["resid_pre.1"]}}),
    (hk.knockout(1, key=0), {"key": None}),
    (hk.knockout(1, key=0), {"key": 1.5}),
    (hk.knockout(1, key=0), {"sites": {"$sites": ["z.1"]}}),
    (hk.ablate("z.1"), {"to": "median"}),
    (hk.ablate("z.1"), {"to": 5}),
    (hk.ablate("z.1"), {"units": []}),
    (hk.ablate("z.1"), {"units": [1.5]}),
    (
        hk.ablate("z.1", to="mean", over=["tea"]),
        {"to": {"$value": "Reference", "how": "mean", "per": "row", "seed": 0}},
    ),
    (hk.capture("z.1"), {"dtype": "int8"}),
    (hk.capture("z.1"), {"device": "meta"}),
    (hk.capture("z.1"), {"grad": "yes"}),
    (hk.capture("z.1"), {"name": 5}),
    (
        hk.ban(5, when=hk.when.entropy_above(1.0)),
        {"when": {"$value": "LogitCondition", "quantity": "heat"}},
    ),
    (
        hk.ban(5),
        {
            "when": {
                "$value": "LogitCondition",
                "quantity": "rank",
                "token": 5,
                "compare": "at_most",
                "limit": 0,
            }
        },
    ),
    (hk.ban(5), {"when": {"$value": "Nothing"}}),
    (hk.ban(5), {"when": {}}),
    (hk.ban(5), {"sites": {"$nothing": 5}}),
]


@pytest.mark.parametrize(("hook", "spoiled"), SPOILED, ids=lambda value: str(value)[:60])
def test_no_file_makes_a_hook_that_its_function_refuses(hook, spoiled):
    text = json.dumps({**json.loads(hook.to_json()), **spoiled})
    assert hk.types.Hook.from_json(hook.to_json()) == hook
    with pytest.raises(hk.errors.HookkitError):
        hk.types.Hook.from_json(text)


def test_no_copy_and_no_construction_makes_a_hook_that_its_function_refuses():
    for hook, changes in (
        (hk.force(7), {"margin": -5.0}),
        (hk.force(7), {"token": 5.5}),
        (hk.scale("z.1", 2.0), {"factor": float("nan")}),
        (hk.scale("z.1", 2.0), {"sites": []}),
        (hk.ban(7), {"tokens": ()}),
        (hk.capture("z.1"), {"dtype": "int8"}),
    ):
        with pytest.raises(hk.errors.HookkitError):
            replace(hook, **changes)
        values = {field.name: getattr(hook, field.name) for field in fields(hook)}
        with pytest.raises(hk.errors.HookkitError):
            type(hook)(**{**values, **changes})


def test_every_kind_of_hook_is_in_the_table_and_read_in_a_fresh_process(llama):
    run = hk.forward(llama, [[5, 6, 7]], hk.capture("z.1"))
    hooks = [
        hk.capture("z.1", dtype="float16"), hk.steer("resid_post.1", ONES), hk.scale("z.1", 2.0),
        hk.project_out("resid_post.1", ONES), hk.skip_block(1), hk.ablate("z.1", to="mean", over=["tea"]),
        hk.patch("z.1", run), hk.knockout(1, key=hk.at("tea")), hk.force(hk.word([7, 8])), hk.ban(" tea", 5),
        hk.restrict(5), hk.boost(by={5: 1.0, 6: 2.0}), hk.cap(5, prob=0.5), hk.swap(5, 6), hk.set_rank(5, 3),
        hk.toward("tea", by=1.0), hk.away_from(hk.Site("resid_post", 1), by=1.0),
        hk.grammar(regex="a"), hk.swap_concept(LENS, 7, 9, layers=[0, 1]),
    ]  # fmt: skip
    grid = {"layer": [1]}
    plan = hk.sweep_plan(
        llama,
        [[5, 6]],
        grid,
        lambda layer: hk.scale("z.1", 2.0),
        hk.metrics.logit(5),
        control="random",
    )
    hooks.append(plan.cells[-1].hooks[0])
    assert {hook.verb for hook in hooks} == {*HOOK_TYPES} - {"edit"}
    code = (
        "import sys, json\nfrom hookkit.hooks.serialization import from_json\n"
        "for text in json.load(sys.stdin):\n    assert from_json(text).to_json() == text\nprint('read')"
    )
    texts = json.dumps([hook.to_json() for hook in hooks])
    done = subprocess.run(
        [sys.executable, "-c", code], input=texts, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "read", done.stderr


def sentencepiece_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as ▁, before the first word or not."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    made.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["bytes", "always", "first", "never"])
def test_every_spelling_that_an_error_offers_is_accepted(small_tokenizer, kind):
    tokenizer = small_tokenizer if kind == "bytes" else sentencepiece_tokenizer(kind)
    lm = hk.tiny("llama", tokenizer=tokenizer, config={"vocab_size": len(tokenizer)})
    drawn = random.Random(0)
    words = [
        *WORDS,
        *(word.upper() for word in WORDS),
        *(f" {a} {b}" for a, b in itertools.pairwise(WORDS)),
    ]
    words += ["".join(drawn.choices("aeiou tnrs'é\n\"", k=drawn.randint(1, 6))) for _ in range(200)]
    refused = 0
    for word in dict.fromkeys(words):
        try:
            lm.token(word)
        except NotOneToken as error:
            refused += 1
            offers = str(error).split("One token each: ")[-1].removesuffix(".")
            for offer in [] if offers.startswith("no near spelling") else eval(f"[{offers}]"):
                assert lm.string(lm.token(offer)) == offer, (word, offer)
    assert refused > 50


def _no_default(a, b): ...
def _keyword_only(a, b=1, *, c, d=2): ...
def _variable(*a, b=1): ...
def _any_keyword(a, **b): ...


@pytest.mark.parametrize("function", [_no_default, _keyword_only, _variable, _any_keyword])
def test_a_call_that_fits_a_signature_is_one_that_python_binds(function):
    signature = inspect.signature(function)
    fits = _fitting_calls(signature)
    has_variable = function in (_variable, _any_keyword)
    names = [name for count in range(5) for name in itertools.combinations("abcd", count)]
    for count, keywords in itertools.product(range(5), [*names, ("e",), ("a", "e")]):
        args, kwargs = (0,) * count, dict.fromkeys(keywords, 0)
        try:
            signature.bind(*args, **kwargs)
            binds = not has_variable
        except TypeError:
            binds = False
        assert fits(args, kwargs) == binds, (args, kwargs)


def test_a_list_has_a_token_for_each_prompt_and_a_tuple_as_long_as_the_batch_is_refused(llama):
    pairs = hk.datasets.induction(llama, 4, length=5)
    run = hk.forward(llama, pairs.clean)
    last = torch.stack([run.logits[row, length - 1] for row, length in enumerate(run.lengths)])
    answers = [llama.token(token) for token in pairs.answers]
    wrong = [llama.token(token) for token in pairs.wrong]
    expected = torch.stack([last[row, answers[row]] - last[row, wrong[row]] for row in range(4)])
    for metric in (pairs.metric(), hk.metrics.logit_diff(pairs.answers, pairs.wrong)):
        assert torch.allclose(metric(run), expected, atol=1e-5)
    several = (
        hk.metrics.logit_diff([tuple(answers)] * 4, [tuple(wrong)] * 4)
        if len({*answers, *wrong}) == 8
        else None
    )
    if several is not None:
        means = last[:, answers].mean(1) - last[:, wrong].mean(1)
        assert torch.allclose(several(run), means, atol=1e-5)
    with pytest.raises(hk.errors.HookkitError, match=r"list\(answers\)"):
        hk.metrics.logit_diff(tuple(pairs.answers), tuple(pairs.wrong))(run)


def test_a_continuation_as_long_as_the_batch_is_refused(llama):
    run_of = hk.metrics.loss((5, 6))
    with pytest.raises(hk.errors.BadHook, match=r"one token after each prompt, or all of them"):
        run_of.prepare(llama, 2)
    assert run_of.prepare(llama, 3) == [(5, 6)] * 3
    assert hk.metrics.loss([(5, 6), (7, 8)]).prepare(llama, 2) == [(5, 6), (7, 8)]


# ---- the subject of a function: a model, a run or a table


MODULES = (hk, hk.metrics, hk.figures, hk.stats, hk.results, hk.datasets, hk.when)
NEEDS = {
    # the annotation of the first parameter, and what the message says is needed
    "LM": "a model as an LM",
    "LM | nn.Module": "a model as an LM",
    "Run": "a run: hk.forward",
    "pd.DataFrame": "a pandas table",
    "Run | pd.DataFrame": "a run: hk.forward",
}


def functions_by_subject() -> dict[str, list]:
    """Every public function that has a model, a run or a table as its first argument."""
    found: dict[str, list] = {}
    for module in MODULES:
        for name in dir(module):
            function = getattr(module, name)
            if not inspect.isfunction(function):
                continue
            parameters = list(inspect.signature(function).parameters.values())
            kind = parameters[0].annotation if parameters else None
            kind = getattr(kind, "__name__", kind)
            if kind in NEEDS:
                found.setdefault(kind, []).append(function)
    return found


FUNCTIONS = [
    pytest.param(kind, function, id=f"{function.__module__}.{function.__name__}")
    for kind, functions in functions_by_subject().items()
    for function in functions
]


@pytest.fixture(scope="module")
def subjects(small_tokenizer):
    lm = hk.tiny("llama", tokenizer=small_tokenizer, config={"vocab_size": len(small_tokenizer)})
    run = hk.forward(lm, "I like oat milk")
    return {
        "lm": lm,
        "run": run,
        "table": hk.ranks(run),
        "model": lm.model,
        "tokenizer": lm.tokenizer,
        "hook": hk.ban(5),
        "text": "I like oat milk",
        "texts": ["I like oat milk"],
        "none": None,
        "tensor": torch.ones(3),
    }


FITTING = {  # the subjects that are right
    "LM": {"lm"},
    "LM | nn.Module": {"lm", "model"},
    "Run": {"run"},
    "pd.DataFrame": {"table"},
    "Run | pd.DataFrame": {"run", "table"},
}


def called_with(function, value, second=None):
    """Calls a function with this first argument, and None or `second` for the others."""
    parameters = list(inspect.signature(function).parameters.values())
    required = [one for one in parameters[1:] if one.default is one.empty]
    positional = [one for one in required if one.kind is one.POSITIONAL_OR_KEYWORD]
    named = {one.name: None for one in required if one.kind is one.KEYWORD_ONLY}
    others = [None] * len(positional)
    if others:
        others[0] = second
    return function(value, *others, **named)


@pytest.mark.parametrize(("kind", "function"), FUNCTIONS)
def test_a_function_with_another_subject_says_which_it_needs(subjects, kind, function):
    for name, value in subjects.items():
        if name in FITTING[kind]:
            continue
        with pytest.raises(hk.errors.HookkitError) as caught:
            called_with(function, value)
        message = str(caught.value)
        assert NEEDS[kind] in message, (name, message)
        assert len(message) < 300, (name, message)
        if kind == "LM" and name in ("text", "texts", "run"):
            assert "the model comes first" in message, (name, message)
        if kind == "Run" and name == "table":
            assert "not a table" in message, message
        if kind == "pd.DataFrame" and name == "run":
            assert "not a run" in message, message


@pytest.mark.parametrize(("kind", "function"), FUNCTIONS)
def test_a_model_and_prompts_that_change_places_are_recognised(subjects, kind, function):
    if kind != "LM":
        pytest.skip("a function of models")
    with pytest.raises(hk.errors.HookkitError, match="the model comes first"):
        called_with(function, "I like oat milk", second=subjects["lm"])


def test_functions_of_a_model_take_it_first_and_then_the_prompts():
    """A run, a table or a model is the first argument wherever a function takes one."""
    misplaced = []
    for module in MODULES:
        for name in dir(module):
            function = getattr(module, name)
            if not inspect.isfunction(function):
                continue
            parameters = inspect.signature(function).parameters.values()
            kinds = [getattr(one.annotation, "__name__", one.annotation) for one in parameters]
            positions = {kind: kinds.index(kind) for kind in NEEDS if kind in kinds}
            prompts = [number for number, kind in enumerate(kinds) if kind == "Prompts"]
            if positions.get("LM", 0) > 0 or positions.get("Run", 0) > 0:
                misplaced.append(name)
            if positions.get("pd.DataFrame", 0) > 0:
                misplaced.append(name)
            if prompts and ("LM" not in positions or prompts[0] > 2):
                misplaced.append(name)
    allowed = {"parse_hook", "load_hooks"}  # the model is an optional keyword there
    assert set(misplaced) <= allowed
    subjects = functions_by_subject()
    assert len(subjects["LM"]) > 30 and len(subjects["Run"]) > 8
    assert len(subjects["pd.DataFrame"]) > 15
