"""A grammar holds for every generated text, whatever else edits the logits and however they are decoded."""

import html
import json
import re
from dataclasses import replace

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from llguidance.hf import from_tokenizer
from test_arguments import sentencepiece_tokenizer
from transformers import LogitsProcessorList

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, Unsupported

PROMPTS = ["I like oat milk in my", "Tea", "Mary and John went to the store"]
SCHEMA = {
    "type": "object",
    "properties": {
        "drink": {"enum": ["coffee", "tea", "oat milk"]},
        "cups": {"type": "integer", "minimum": 0, "maximum": 999},
        "hot": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["drink", "cups", "hot"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
REGEX = r" (tea|coffee|milk)( and (tea|coffee)){0,2}[.!]"
SAMPLED = {"do_sample": True, "temperature": 2.0, "top_k": 0}
DECODING = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "sampling": {**SAMPLED, "seed": 3},
    "top_k and top_p": {"do_sample": True, "top_k": 20, "top_p": 0.8, "seed": 4},
    "min_p, without a cache": {"do_sample": True, "min_p": 0.02, "seed": 5, "use_cache": False},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 3.0},
}


@pytest.fixture(scope="module")
def lm(small_tokenizer) -> hk.LM:
    return hk.tiny(
        "llama",
        tokenizer=small_tokenizer,
        config={"eos_token_id": 1, "max_position_embeddings": 512},
    )


def texts_of(run: hk.types.Run) -> list[str]:
    """The generated texts, each of which must have come to its end."""
    texts = []
    for text in run.generated:
        assert text.endswith(("</s>", "<|im_end|>")), text
        texts.append(re.sub(r"(</s>|<\|im_end\|>)$", "", text))
    return texts


def sampled_documents(lm: hk.LM, count: int, max_new_tokens: int) -> list[str]:
    """Documents that are sampled under the grammar with bans, words and boosts around it."""
    hooks = [
        hk.boost('"', "g", "o", by=3.0),
        hk.ban("7"),
        hk.grammar(json=SCHEMA),
        hk.ban(hk.word("go")),
        hk.boost("9", "e", by=2.0),
    ]
    prompt = "A cup of something as JSON: "
    settings = {**SAMPLED, "num_return_sequences": count, "max_new_tokens": max_new_tokens}
    return texts_of(hk.generate(lm, prompt, *hooks, seed=0, logits=False, **settings))


def check_documents(texts: list[str]) -> None:
    for text in texts:
        document = json.loads(text)
        jsonschema.validate(document, SCHEMA)
        assert "7" not in str(document["cups"]) and not re.search(r"\bgo\b", text.lower())
    assert len(set(texts)) > len(texts) / 10


def test_500_sampled_documents_with_bans_and_boosts_are_valid(lm):
    check_documents(sampled_documents(lm, 500, 120))


@pytest.mark.slow
def test_500_sampled_documents_of_the_default_model_are_valid(smol):
    check_documents(sampled_documents(smol, 500, 100))


def test_every_sampled_text_matches_the_regex(lm):
    run = hk.generate(
        lm, PROMPTS, hk.grammar(regex=REGEX), seed=1, num_return_sequences=50, max_new_tokens=60, **SAMPLED
    )  # fmt: skip
    texts = texts_of(run)
    assert len(texts) == 150 and len(set(texts)) > 5
    assert all(re.fullmatch(REGEX, text) for text in texts)


@pytest.mark.parametrize(
    "grammar", ['root ::= " " name\nname ::= [a-c]{2} | "x"', 'start: " " name\nname: /[a-c]{2}/ | "x"']
)  # fmt: skip
def test_a_grammar_in_either_notation_of_ebnf(lm, grammar):
    run = hk.generate(lm, PROMPTS, hk.grammar(ebnf=grammar), seed=0, max_new_tokens=8, **SAMPLED)
    assert all(re.fullmatch(r" ([a-c]{2}|x)", text) for text in texts_of(run))


# ---- the second route: plain transformers, and the same library by hand


class ByHand:
    """A logits processor that reads each row's new tokens again at each step."""

    def __init__(self, lm: hk.LM, grammar: str, width: int, ends: tuple[int, ...] = (1,)) -> None:
        self.tokenizer = from_tokenizer(lm.tokenizer)
        self.grammar, self.width, self.ends = grammar, width, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = scores.clone()
        for row, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if any(end in tokens for end in self.ends):
                continue
            matcher = llguidance.LLMatcher(self.tokenizer, self.grammar)
            if matcher.consume_tokens(tokens):
                mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                bits = np.unpackbits(mask, bitorder="little")[: scores.shape[-1]]
                new[row, torch.from_numpy(bits == 0)] = -torch.inf
        return new


def padded(lm: hk.LM, prompts: list[str]) -> dict[str, torch.Tensor]:
    rows = [lm.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(lm: hk.LM, kind: str, text: str, settings: dict) -> list[list[int]]:
    """The new tokens of plain transformers with `ByHand`, each row up to its end token."""
    inputs, settings = padded(lm, PROMPTS), dict(settings)
    width = inputs["input_ids"].shape[1]
    processor = ByHand(lm, llguidance.grammar_from(kind, text), width)
    torch.manual_seed(settings.pop("seed", 0))
    sequences = lm.model.generate(
        **inputs, logits_processor=LogitsProcessorList([processor]), pad_token_id=0, max_new_tokens=60, **settings
    )  # fmt: skip
    return [cut(row[width:].tolist()) for row in sequences]


def cut(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(1) + 1] if 1 in tokens else tokens


def written(run: hk.types.Run) -> list[list[int]]:
    rows = zip(run.tokens.tolist(), run.prompt_lengths, run.lengths, strict=True)
    return [row[start:end] for row, start, end in rows]


@pytest.mark.parametrize("settings", DECODING.values(), ids=DECODING)
@pytest.mark.parametrize("kind", ["regex", "json"])
def test_a_loop_by_hand_in_plain_transformers_gives_the_same_tokens(lm, kind, settings):
    text = REGEX if kind == "regex" else json.dumps(SCHEMA)
    run = hk.generate(lm, PROMPTS, hk.grammar(**{kind: text}), max_new_tokens=60, **settings)
    assert written(run) == by_hand(lm, kind, text, settings)


def test_beams_of_plain_transformers_with_a_hook_by_hand_are_the_same(lm):
    text = llguidance.grammar_from("regex", REGEX)
    inputs = padded(lm, PROMPTS)
    processor = ByHand(lm, text, inputs["input_ids"].shape[1])
    settings = {"num_beams": 4, "do_sample": False, "max_new_tokens": 20, "use_cache": False}

    def mask(module, args, kwargs, output):
        last = processor(kwargs["input_ids"], output.logits[:, -1])
        output.logits = torch.cat([output.logits[:, :-1], last[:, None]], dim=1)
        return output

    handle = lm.model.register_forward_hook(mask, with_kwargs=True)
    try:
        sequences = lm.model.generate(**inputs, pad_token_id=0, num_return_sequences=2, **settings)
    finally:
        handle.remove()
    expected = [cut(row[inputs["input_ids"].shape[1] :].tolist()) for row in sequences]
    hook = hk.grammar(regex=REGEX)
    assert written(hk.generate(lm, PROMPTS, hook, num_return_sequences=2, **settings)) == expected
    settings.pop("use_cache")
    assert written(hk.generate(lm, PROMPTS, hook, num_return_sequences=2, **settings)) == expected
    sampled = {**settings, "do_sample": True, "temperature": 3.0, "seed": 0}
    texts = texts_of(hk.generate(lm, PROMPTS, hook, **sampled))
    assert all(re.fullmatch(REGEX, text) for text in texts)


def test_more_beams_than_texts_are_refused_where_a_beam_is_none(lm):
    hook = hk.grammar(regex="(a|b)")
    settings = {"num_beams": 6, "max_new_tokens": 2}
    with pytest.raises(Unsupported, match="fewer texts than there are beams"):
        hk.generate(lm, "Tea", hook, do_sample=True, seed=0, num_return_sequences=6, **settings)
    run = hk.generate(lm, PROMPTS, hook, do_sample=False, num_return_sequences=2, **settings)
    assert sorted(texts_of(run)) == ["a"] * 3 + ["b"] * 3


# ---- one meaning everywhere


def test_rows_of_a_batch_have_their_own_grammars_as_if_alone(lm):
    hooks = {0: hk.grammar(regex=REGEX), 1: hk.grammar(json=SCHEMA)}
    of_rows = [replace(hook, where=replace(hook.where, rows=(row,))) for row, hook in hooks.items()]
    settings = {"max_new_tokens": 60, "do_sample": False}
    together = hk.generate(lm, PROMPTS, *of_rows, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = hk.generate(lm, prompt, *([hooks[row]] if row in hooks else []), **settings)
        assert together.generated[row] == alone.generated[0]


def test_generate_of_other_code_keeps_the_grammar(lm):
    hook, inputs = hk.grammar(regex=REGEX), padded(lm, PROMPTS)
    run = hk.generate(lm, PROMPTS, hook, max_new_tokens=60, do_sample=False)
    with hk.attach(lm, hook):
        sequences = lm.model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=0)
        with pytest.raises(Unsupported, match="a decoding loop of one's own"):
            lm.model(**inputs)
    width = inputs["input_ids"].shape[1]
    assert [cut(row[width:].tolist()) for row in sequences] == written(run)


@pytest.mark.parametrize("name", ["greedy", "sampling", "top_k and top_p"])
def test_a_logits_processor_keeps_the_grammar(lm, name):
    hooks, settings = [hk.boost("a", by=1.0), hk.grammar(regex=REGEX)], dict(DECODING[name])
    run = hk.generate(lm, PROMPTS, *hooks, max_new_tokens=60, **settings)
    inputs, processor = padded(lm, PROMPTS), hk.logits_processor(lm, *hooks)
    torch.manual_seed(settings.pop("seed", 0))
    given = {**inputs, "logits_processor": [processor], "pad_token_id": 0, "max_new_tokens": 60}
    sequences = lm.model.generate(**given, **settings)
    width = inputs["input_ids"].shape[1]
    assert [cut(row[width:].tolist()) for row in sequences] == written(run)
    stopped = {**given, "stop_strings": ["tea", "milk"], "tokenizer": lm.tokenizer}
    assert len(lm.model.generate(**stopped, do_sample=False)) == 3
    with pytest.raises(Unsupported, match="does not see which beams are returned"):
        lm.model.generate(**given, num_beams=2)
    conflict = hk.logits_processor(lm, hk.restrict("x"), *hooks)
    with pytest.raises(BadEdit, match=r"restrict\('x'\) leaves none of the tokens"):
        lm.model.generate(**{**given, "logits_processor": [conflict]})


def test_a_push_that_sampling_overrules_is_no_broken_decision(lm):
    processor = hk.logits_processor(lm, hk.force(7, margin=0.1))
    given = {**padded(lm, PROMPTS), "logits_processor": [processor], "pad_token_id": 0}
    torch.manual_seed(0)
    assert lm.model.generate(**given, max_new_tokens=20, **SAMPLED).shape[0] == 3


def test_in_a_forward_it_acts_as_before_the_first_token(lm):
    hook = hk.grammar(regex=REGEX)
    forward = hk.forward(lm, PROMPTS, hook)
    run = hk.generate(lm, PROMPTS, hook, max_new_tokens=1, do_sample=False)
    for row, length in enumerate(forward.lengths):
        first = forward.logits[row, length - 1]
        assert torch.equal(first.isfinite(), run.logits[row, 0].isfinite())
        possible = [lm.string(token) for token in first.isfinite().nonzero().flatten().tolist()]
        assert possible and all(text in " tea coffee milk" for text in possible)
    plain = hk.forward(lm, PROMPTS)
    assert torch.equal(forward.logits[0, :-1][:3], plain.logits[0, :-1][:3])


def test_a_row_that_another_rule_has_ended_is_left_alone(lm):
    settings = {"max_new_tokens": 30, "stop_strings": ["tea", "milk"], **SAMPLED}
    run = hk.generate(lm, PROMPTS, hk.grammar(regex=REGEX), seed=2, num_return_sequences=10, **settings)  # fmt: skip
    ends = [text for text in run.generated if not text.endswith("</s>")]
    assert len({len(tokens) for tokens in written(run)}) > 1
    assert ends and all(text.endswith(("tea", "milk")) for text in ends)


def test_only_the_end_token_is_possible_after_the_end(lm):
    hook = hk.grammar(regex=" tea")
    run = hk.generate(lm, "A", hook, do_sample=False, max_new_tokens=9, eos_token_id=None)
    assert run.generated[0].replace("</s>", "") == " tea" and run.generated[0].endswith("</s></s>")
    other = hk.generate(
        lm, "A", hook, do_sample=False, max_new_tokens=9, eos_token_id=lm.token("!")
    )
    assert other.generated == [" tea!"]
    with pytest.raises(BadEdit, match="MinLengthLogitsProcessor leaves none of the tokens"):
        hk.generate(lm, "A", hook, do_sample=False, min_length=20, max_new_tokens=20)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_tokenizer_that_writes_spaces_as_marks(scheme):
    tokenizer = sentencepiece_tokenizer(scheme)
    lm = hk.tiny("llama", tokenizer=tokenizer, config={"vocab_size": 512, "eos_token_id": 2})
    assert lm.n_tokens < 512  # the rows after the vocabulary are padding
    hook = hk.grammar(regex=r" [a-z]{3,9} (and|or) [a-z]{2}")
    run = hk.generate(lm, PROMPTS, hook, seed=0, max_new_tokens=40, num_return_sequences=10, **SAMPLED)  # fmt: skip
    for row, tokens in enumerate(written(run)):
        assert tokens[-1] == 2 and max(tokens) < lm.n_tokens
        prompt = run.tokens[row, : run.prompt_lengths[row]].tolist()
        text = lm.text([*prompt, *tokens[:-1]]).removeprefix(lm.text(prompt))
        assert re.fullmatch(hook.text, text), text


# ---- who disagrees


GRAMMAR = hk.grammar(regex=" (tea|coffee)")
FIRST = (" ", " t", " c", " coffee")  # its first tokens, in this tokenizer
CONFLICTS = {
    "a ban after it": ([GRAMMAR, hk.ban(FIRST)], {}, "ban"),
    "a ban before it": ([hk.ban(FIRST), GRAMMAR], {}, "ban"),
    "a restriction after it": ([GRAMMAR, hk.restrict("x")], {}, r"restrict\('x'\)"),
    "a restriction before it": ([hk.restrict("x"), hk.boost("x", by=1.0), GRAMMAR], {}, r"restrict\('x'\)"),
    "a forced token after it": ([GRAMMAR, hk.force("x", step=0)], {}, r"force\('x', step=0\)"),
    "a forced token before it": ([hk.force("x", step=0), GRAMMAR], {}, r"force\('x', step=0\)"),
    "a push after it": ([GRAMMAR, hk.force("x", margin=2.0)], {}, r"force\('x', margin=2.0\)"),
    "a push before it": ([hk.force("x", margin=2.0), GRAMMAR], {}, r"force\('x', margin=2.0\)"),
    "a swap after it": ([GRAMMAR, hk.swap(" ", "x")], {}, r"swap\(' ', 'x'\)"),
    "another grammar": ([GRAMMAR, hk.grammar(regex="x")], {}, r"grammar\(regex='x'\)"),
    "a function": ([GRAMMAR, hk.edit("logits", lambda x, _: x.clamp(min=-50.0))], {}, "edit"),
    "prefix_allowed_tokens_fn": ([GRAMMAR], {"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "prefix_allowed"),
    "a rule of generate": ([GRAMMAR], {"forced_eos_token_id": 1, "max_new_tokens": 1}, "generate's ForcedEOS"),
    "sampling": ([GRAMMAR, hk.force("x")], SAMPLED, r"force\('x'\)"),
    "beams": ([GRAMMAR, hk.force("x")], {"num_beams": 2}, r"force\('x'\)"),
}  # fmt: skip


@pytest.mark.parametrize(("hooks", "settings", "other"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_conflict_is_raised_before_a_token_is_drawn_and_names_both(lm, hooks, settings, other):
    name = re.escape(str(GRAMMAR)) if "grammar" not in other else "grammar"
    with pytest.raises(BadEdit, match=f"{other}.*(leaves|makes|puts).*{name}.*change one"):
        hk.generate(lm, "A", *hooks, **{"max_new_tokens": 6, **settings})


def test_the_order_of_edits_and_a_force_that_agrees(lm):
    for hooks in ([GRAMMAR, hk.force(" c", step=0)], [hk.force(" c", step=0), GRAMMAR]):
        run = hk.generate(lm, PROMPTS, *hooks, max_new_tokens=9, seed=0, **SAMPLED)
        assert texts_of(run) == [" coffee"] * 3
    # a probability is one among the allowed tokens, or among all
    alone, first = hk.cap(FIRST[1:], prob=0.01, step=0), hk.generate(lm, "A", GRAMMAR, max_new_tokens=1)  # fmt: skip
    after = hk.generate(lm, "A", GRAMMAR, alone, max_new_tokens=1).logits[0, 0]
    assert after.softmax(-1)[[lm.token(text) for text in FIRST[1:]]].sum() <= 0.0101
    before = hk.generate(lm, "A", alone, GRAMMAR, max_new_tokens=1).logits[0, 0]
    assert before.isfinite().sum() == after.isfinite().sum() == first.logits[0, 0].isfinite().sum()
    assert not torch.equal(before, after)


# ---- what is shown, written and refused


def test_the_trace_says_what_the_grammar_has_banned(lm):
    run = hk.generate(lm, "A", GRAMMAR, trace=hk.trace(), max_new_tokens=9, do_sample=False)
    why = hk.decisions(run)["why"].tolist()
    plain = hk.forward(lm, "A").logits[0, -1]
    first = lm.string(int(plain.argmax()))
    assert why[0].endswith(f"; {GRAMMAR} banned {first!r}, rank 1 for the model")
    assert "the only candidate left" in " ".join(why)
    both = hk.generate(
        lm, "A", hk.ban(int(plain.argmax())), GRAMMAR, trace=hk.trace(), max_new_tokens=1, do_sample=False
    )  # fmt: skip
    assert hk.decisions(both)["why"][0].endswith(f"banned {first!r} was first for the model")


def test_with_and_without_it_and_another_turn(lm):
    settings = {"max_new_tokens": 9, "do_sample": False}
    both = hk.compare_generations(lm, "A", GRAMMAR, along="edited", **settings)
    assert re.fullmatch(GRAMMAR.text, both.texts["edited"][0].removesuffix("</s>"))
    assert len(both.summary) > 1
    with pytest.raises(Unsupported, match='compare along="edited"'):
        _ = hk.compare_generations(lm, "A", GRAMMAR, **settings).shifts
    run = hk.generate(lm, "A", GRAMMAR, **settings)
    assert hk.fork(run, step=0, token=" c").generated == [" coffee</s>"]
    with pytest.raises(BadEdit, match="allows in row 0 at step 0"):
        hk.fork(run, step=0, token="x")


def test_it_is_a_value_with_texts(lm, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    hooks = [hk.grammar(json=SCHEMA), hk.grammar(regex=r"\w+@\w+", rows=[0, 2]), hk.grammar(ebnf='root ::= "a"')]  # fmt: skip
    for hook in hooks:
        assert hk.types.Hook.from_json(hook.to_json()) == hook
        assert hk.parse_hook(hk.format_hook(hook)) == hook
        assert html.escape(str(hook)) in hook._repr_html_()
    assert hk.format_hook(hooks[1]) == r"grammar:regex:\w+@\w+@rows=[0, 2]"
    assert hk.parse_hook(f"grammar:json:{path}") == hk.grammar(json=json.dumps(SCHEMA)) == hooks[0]
    assert str(hooks[1]) == r"grammar(regex='\\w+@\\w+', rows=(0, 2))"


def test_a_pydantic_model_is_a_schema(lm):
    pydantic = pytest.importorskip("pydantic")
    closed = pydantic.ConfigDict(extra="forbid")
    kind = pydantic.create_model("Order", __config__=closed, cups=(bool, ...), hot=(bool, ...))
    hooks = [hk.grammar(json=kind), hk.ban(" ", "\n", "\t", "\r")]
    run = hk.generate(lm, "A", *hooks, seed=0, max_new_tokens=60, **SAMPLED)
    kind.model_validate_json(texts_of(run)[0])


REFUSED = {
    "none": ({}, "none"),
    "two": ({"json": {}, "regex": "a"}, "json and regex"),
    "no JSON": ({"json": "{"}, "is no JSON"),
    "no schema": ({"json": 5}, "give a dict"),
    "a schema that cannot be kept": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "look-around": ({"regex": "a(?=b)"}, "look-around"),
    "no text": ({"regex": ""}, "regular expression"),
    "an unknown name": ({"ebnf": "start: foo"}, 'unknown name: "foo"'),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_grammar_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(BadHook, match=re.escape(reason)):
        hk.grammar(**arguments)


def test_what_a_grammar_does_not_take_is_refused(lm):
    for where in ({"pos": -1, "step": None}, {"step": (3,)}):
        with pytest.raises(BadHook, match="acts at every step"):
            replace(GRAMMAR, where=replace(GRAMMAR.where, **where))
    with pytest.raises(BadHook, match="acts at every step"):
        replace(GRAMMAR, when=hk.when.entropy_above(1.0))
    with pytest.raises(BadHook, match="without a tokenizer"):
        hk.generate(hk.tiny("llama"), [[5, 6]], GRAMMAR, max_new_tokens=2)

    class Slow:
        """A tokenizer that no library can read."""

        def __getattr__(self, name: str) -> object:
            return getattr(lm.tokenizer, name)

        encode = decode = convert_ids_to_tokens = None

    with pytest.raises(BadHook, match="cannot read the tokenizer Slow: Only fast tokenizers"):
        hk.generate(hk.LM(lm.model, Slow()), [[5, 6]], GRAMMAR, max_new_tokens=2)


def test_the_constraints_of_transformers_are_refused_and_its_function_works(lm):
    for arguments in ({"force_words_ids": [[5]]}, {"constraints": [object()]}):
        with pytest.raises(Unsupported, match="hk.grammar"):
            hk.generate(lm, "A", hk.ban(7), num_beams=2, max_new_tokens=2, **arguments)
    only = {"prefix_allowed_tokens_fn": lambda row, ids: [8, 9]}
    run = hk.generate(lm, "A", hk.ban(8), max_new_tokens=2, do_sample=False, **only)
    assert written(run) == [[9, 9]]
