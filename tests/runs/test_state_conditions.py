"""Conditions on the model's state and on the text so far, against hooks written by hand in plain transformers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import PROMPTS
from torch import Tensor
from transformers import DynamicCache

import hookkit as hk
from hookkit.errors import (
    BadEdit,
    BadHook,
    EmptySelection,
    NeverFired,
    OutOfRange,
    UnknownKeyword,
    Unsupported,
)

NEW = 6
VECTOR = torch.linspace(-1, 1, 32)
DIRECTION = torch.cos(torch.arange(32) * 0.7)
BIAS = 0.1
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
WAYS = [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]
ONCE_WAYS = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
Score = Callable[[Tensor], Tensor]

SCORES: dict[str, Score] = {
    "norm": lambda x: x.norm(dim=-1),
    "cosine": lambda x: torch.nn.functional.cosine_similarity(x, DIRECTION, dim=-1),
    "reads": lambda x: torch.sigmoid(x @ (0.1 * DIRECTION) + BIAS),
}


def condition(quantity: str, limit: float, site: str, **settings):
    if quantity == "norm":
        return hk.when.norm_above(limit, site=site, **settings)
    if quantity == "cosine":
        return hk.when.cosine(DIRECTION, above=limit, site=site, **settings)
    probe = hk.types.Probe(site, 0.1 * DIRECTION, bias=BIAS, norm=1.0)
    return hk.when.reads(probe, above=limit, **settings)


@dataclass
class ByHand:
    """A decoding loop of one prompt with two hooks: one reads a block's output, one steers a block's output."""

    model: torch.nn.Module
    read: int
    edit: int
    score: Score
    limit: float
    once: Callable[[list[float]], float] | None = None  # what decides, from the prompt's scores
    scores: dict[int, float] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    def run(self, ids: list[int], new: int) -> tuple[list[int], Tensor]:
        """The tokens and the logits that chose each."""
        self.length, self.past = len(ids), 0
        blocks = self.model.model.layers
        handles = [blocks[self.read].register_forward_hook(self._read)]
        handles.append(blocks[self.edit].register_forward_hook(self._steer))
        cache, chunk, ids, chosen = DynamicCache(), list(ids), list(ids), []
        try:
            for _ in range(new):
                with torch.no_grad():
                    logits = self.model(torch.tensor([chunk]), past_key_values=cache).logits
                self.past = len(ids)
                chosen.append(logits[0, -1])
                ids.append(int(chosen[-1].argmax()))
                chunk = ids[-1:]
        finally:
            for handle in handles:
                handle.remove()
        return ids, torch.stack(chosen)

    def _read(self, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        for offset, value in enumerate(self.score(hidden[0]).tolist()):
            self.scores[self.past + offset] = value

    def _decide(self, position: int) -> bool:
        late = self.read > self.edit
        if late and position < self.length:
            return False
        if self.once is not None:
            return self.once([self.scores[p] for p in range(self.length)]) > self.limit
        return self.scores[position - 1 if late else position] > self.limit

    def _steer(self, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        positions = range(self.past, self.past + hidden.shape[1])
        mask = [self._decide(position) for position in positions]
        self.held += [p for p, holds in zip(positions, mask, strict=True) if holds]
        new = torch.where(torch.tensor(mask)[None, :, None], hidden + 4 * VECTOR, hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new


def middle(lm, score: Score, layer: int, prompts=PROMPTS, per_row=None) -> float:
    """A limit with some positions (or rows) of an unedited run on each side of it."""
    values = []
    for prompt in prompts:
        run = hk.generate(lm, prompt, hk.capture(f"resid_post.{layer}"), **GREEDY)
        scores = score(run[f"resid_post.{layer}"][0])
        if per_row is None:
            values += scores.tolist()
        else:
            values.append(per_row(scores[: run.prompt_lengths[0]].tolist()))
    values.sort()
    half = len(values) // 2
    return (values[half - 1] + values[half]) / 2


def positions_in(text: str) -> list[int]:
    """The positions of the log's column `held`."""
    positions = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        positions += range(int(first), int(last or first) + 1)
    return positions


def held_of(run, row: int) -> list[int]:
    """Every position at which the log says that the condition held."""
    held = set()
    for text in run.log[run.log["row"] == row]["held"]:
        held.update(positions_in(text))
    return sorted(held)


@pytest.mark.parametrize("quantity", SCORES)
@pytest.mark.parametrize(
    ("read", "edit"), [(0, 2), (1, 1), (2, 0)], ids=["before", "same", "after"]
)
def test_a_state_decides_at_each_token_as_hooks_written_by_hand(llama, quantity, read, edit):
    score = SCORES[quantity]
    limit = middle(llama, score, read)
    hook = hk.steer(
        f"resid_post.{edit}",
        VECTOR,
        scale=4.0,
        when=condition(quantity, limit, f"resid_post.{read}"),
    )
    expected = []
    for prompt in PROMPTS:
        loop = ByHand(llama.model, read, edit, score, limit)
        expected.append((*loop.run(llama.tokenizer.encode(prompt), NEW), loop.held))
    n_held = sum(len(held) for _, _, held in expected)
    assert 0 < n_held < sum(len(ids) - 1 for ids, _, _ in expected), "it should hold at some only"
    for way in WAYS:
        prompts = PROMPTS if way != {"prefill_chunk_size": 3} else PROMPTS[:1]
        run = hk.generate(llama, prompts, hook, **GREEDY, **way)
        for row in range(len(prompts)):
            ids, logits, held = expected[row]
            assert run.tokens[row, : run.lengths[row]].tolist() == ids, way
            torch.testing.assert_close(run.logits[row], logits, atol=1e-4, rtol=0)
            assert held_of(run, row) == held, way


OVER = {
    "mean": lambda scores: sum(scores) / len(scores),
    "any": max,
    "last": lambda scores: scores[-1],
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("read", "edit"), [(0, 2), (1, 1), (2, 0)], ids=["before", "same", "after"]
)
def test_a_state_of_the_prompt_decides_once_for_each_row_as_by_hand(llama, over, read, edit):
    score, once = SCORES["reads"], OVER[over]
    limit = middle(llama, score, read, per_row=once)
    when = condition("reads", limit, f"resid_post.{read}", pos=hk.PROMPT, over=over)
    hook = hk.steer(f"resid_post.{edit}", VECTOR, scale=4.0, when=when)
    plain = hk.generate(llama, PROMPTS, **GREEDY)
    expected = []
    for prompt in PROMPTS:
        loop = ByHand(llama.model, read, edit, score, limit, once)
        expected.append((*loop.run(llama.tokenizer.encode(prompt), NEW), loop.held))
    rows_held = [bool(held) for _, _, held in expected]
    assert len(set(rows_held)) == 2, "some rows should be on each side"
    for way in ONCE_WAYS:
        run = hk.generate(llama, PROMPTS, hook, **GREEDY, **way)
        for row, (ids, logits, held) in enumerate(expected):
            assert run.tokens[row, : run.lengths[row]].tolist() == ids, way
            torch.testing.assert_close(run.logits[row], logits, atol=1e-4, rtol=0)
            assert held_of(run, row) == held
            if not held and not way:
                assert torch.equal(run.logits[row], plain.logits[row])
        first = run.log[run.log["forward"] == 0]
        assert (first["held"] != "").tolist() == [holds and read <= edit for holds in rows_held]


def test_right_padding_and_rows_of_several_hooks_change_nothing(llama):
    """A forward pads on the right; each row has a hook and a limit of its own."""
    score = SCORES["norm"]
    limits = [middle(llama, score, 0, [prompt]) for prompt in PROMPTS]
    hooks = []
    for row, limit in enumerate(limits):
        when = hk.when.norm_above(limit, site="resid_post.0")
        hooks.append(hk.steer("resid_post.1", VECTOR, scale=4.0, rows=row, when=when))
    together = hk.forward(llama, PROMPTS, *hooks)
    for row, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True)):
        loop = ByHand(llama.model, 0, 1, score, limit)
        _, logits = loop.run(llama.tokenizer.encode(prompt), 1)
        length = together.lengths[row]
        torch.testing.assert_close(together.logits[row, length - 1], logits[0], atol=1e-4, rtol=0)
        assert held_of(together, row) == loop.held


def test_a_steer_that_asks_the_prompt_leaves_the_other_rows_equal_bit_for_bit(lm):
    limit = middle(lm, SCORES["reads"], 0, per_row=OVER["mean"])
    when = condition("reads", limit, "resid_post.0", pos=hk.PROMPT)
    plain = hk.forward(lm, PROMPTS)
    steered = hk.forward(lm, PROMPTS, hk.steer("resid_post.1", VECTOR, when=when))
    scores = hk.forward(lm, PROMPTS, hk.capture("resid_post.0"))["resid_post.0"]
    for row, length in enumerate(plain.lengths):
        says_yes = float(SCORES["reads"](scores[row, :length]).mean()) > limit
        same = torch.equal(steered.logits[row, :length], plain.logits[row, :length])
        assert same != says_yes


D = 32
EDITS = {
    "edit": lambda when: hk.edit("resid_post.1", lambda x: -x, when=when),
    "steer": lambda when: hk.steer("resid_post.1", VECTOR, when=when),
    "scale": lambda when: hk.scale("resid_post.1", 0.5, when=when),
    "project_out": lambda when: hk.project_out("resid_post.1", VECTOR, when=when),
    "ablate": lambda when: hk.ablate("resid_post.1", when=when),
    "ablate mean": lambda when: hk.ablate("resid_post.1", to="mean", over=["tea"], per="all", when=when),
    "patch": lambda when: hk.patch("resid_post.1", PROMPTS[0], pos=-1, when=when),
    "skip_block": lambda when: hk.skip_block(1, when=when),
    "knockout": lambda when: hk.knockout(2, key=0, query=slice(1, None), when=when),
    "head": lambda when: hk.scale("z.1.2", 3.0, when=when),
    "pattern": lambda when: hk.scale("pattern.1", 3.0, when=when),
    "vector": lambda when: hk.Vector("resid_post.1", VECTOR, norm=2.0).steer(dose=1, when=when),
    "boost": lambda when: hk.boost(5, by=9.0, step=None, pos=slice(0, None), when=when),
    "logits": lambda when: hk.scale("logits", 2.0, when=when),
}  # fmt: skip


@pytest.mark.parametrize("verb", EDITS)
def test_every_verb_acts_where_its_condition_holds_and_nowhere_else(llama, verb):
    """The condition is on the first block; the logits of a position change only if it held there or before."""
    prompts = [PROMPTS[0], PROMPTS[2]]
    score = SCORES["norm"]
    states = hk.forward(llama, prompts, hk.capture("resid_post.0"))["resid_post.0"]
    limit = float(score(states[0, :7]).median()) * 1.0001
    plain = hk.forward(llama, prompts)
    run = hk.forward(llama, prompts, EDITS[verb](hk.when.norm_above(limit, site="resid_post.0")))
    same = torch.equal
    if verb in ("knockout", "pattern"):  # attention is computed another way where it is looked into
        same = lambda x, y: torch.allclose(x, y, atol=1e-5, rtol=0)  # noqa: E731
    n_changed = 0
    for _, line in run.log.iterrows():
        row, length = line["row"], plain.lengths[line["row"]]
        scores = score(states[row, :length])
        asked = positions_in(line["positions"])
        held = [position for position in asked if scores[position] > limit]
        assert positions_in(line["held"]) == held
        n_changed += len(held)
        first = min(held, default=length)
        assert same(run.logits[row, :first], plain.logits[row, :first])
        assert same(run.logits[row, :length], plain.logits[row, :length]) == (not held)
        assert ("norm_above" in line["reason"]) == (len(held) < len(asked))
    assert n_changed
    always = hk.forward(llama, prompts, EDITS[verb](hk.when.norm_above(0, site="resid_post.0")))
    assert torch.equal(always.logits, hk.forward(llama, prompts, EDITS[verb](None)).logits)


def test_a_condition_at_the_edits_own_site_needs_no_name(llama):
    states = hk.forward(llama, PROMPTS[0], hk.capture("z.1.2"))["z.1.2"]
    limit = float(states[0].norm(dim=-1).median()) * 1.0001
    run = hk.forward(llama, PROMPTS[0], hk.scale("z.1.2", 2.0, when=hk.when.norm_above(limit)))
    assert held_of(run, 0) == (states[0].norm(dim=-1) > limit).nonzero().flatten().tolist()


def test_a_condition_reads_what_the_hooks_before_it_left_at_its_site(llama):
    norm = hk.when.norm_above(1e4, site="resid_post.0")
    steer, scale = hk.steer("resid_post.1", VECTOR, when=norm), hk.scale("resid_post.0", 1e6)
    after = hk.forward(llama, PROMPTS[0], scale, steer)
    before = hk.forward(llama, PROMPTS[0], steer, scale)
    held = [log[log["site"] == "resid_post.1"]["held"].item() for log in (after.log, before.log)]
    assert held == [f"0-{after.lengths[0] - 1}", ""]


# ---- the text so far


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("prompt_counts", [True, False])
def test_a_text_decides_by_what_is_decoded_up_to_each_token(llama, way, prompt_counts):
    """ "milk" is several tokens in this vocabulary; the edit holds from its last one on."""
    prompt, tokenizer = "I like oat milk in", llama.tokenizer
    prompts = [prompt, "Tea"] if way != {"prefill_chunk_size": 3} else [prompt]
    hook = hk.steer("resid_post.1", VECTOR, when=hk.when.contains("oat mi", prompt=prompt_counts))
    run = hk.generate(llama, prompts, hook, hk.force(hk.word(" my oat milk", exact=True)), **GREEDY)
    for row in range(len(prompts)):
        ids, length = run.tokens[row].tolist(), run.prompt_lengths[row]
        start = 0 if prompt_counts else length
        expected = []
        for position in range(run.lengths[row] - 1):
            if "oat mi" in tokenizer.decode(ids[start : position + 1]) and position >= start:
                expected.append(position)
        held = set()
        for text in run.log[(run.log["row"] == row) & (run.log["hook"] == 0)]["held"]:
            held.update(positions_in(text))
        assert sorted(held) == expected


def test_a_ban_that_waits_for_the_end_of_a_text_acts_at_that_step_only(llama):
    tokenizer = llama.tokenizer
    plain = hk.generate(llama, PROMPTS[0], **GREEDY)
    ids, length = plain.tokens[0].tolist(), plain.prompt_lengths[0]
    end = tokenizer.decode(ids[length : length + 3])
    ban = hk.ban(ids[length + 3], when=hk.when.text_ends(end, prompt=False))
    run = hk.generate(llama, PROMPTS[0], ban, **GREEDY)
    acted = run.log.sort_values("forward")["held"] != ""
    for step, holds in enumerate(acted):
        text = tokenizer.decode(run.tokens[0, length : length + step].tolist())
        assert holds == text.endswith(end)
    assert acted[3] and run.tokens[0, length + 3] != ids[length + 3]


# ---- the logits, for edits inside the model


def test_the_logits_decide_on_an_inner_edit_of_the_next_token(llama):
    plain = hk.generate(llama, PROMPTS, **GREEDY)
    entropies = torch.distributions.Categorical(logits=plain.logits.double()).entropy()
    ordered = entropies.flatten().sort().values
    limit = float(ordered[8:10].mean())
    hook = hk.steer("resid_post.1", 1e-6 * VECTOR, when=hk.when.entropy_above(limit))
    for way in ONCE_WAYS:
        run = hk.generate(llama, PROMPTS, hook, **GREEDY, **way)
        assert torch.equal(run.tokens, plain.tokens)
        for row, length in enumerate(run.prompt_lengths):
            held = (entropies[row, :-1] > limit).nonzero().flatten() + length
            assert held_of(run, row) == held.tolist()


# ---- combined


def test_conditions_are_combined_for_each_row_and_position(llama):
    prompts = PROMPTS[::2]
    states = hk.forward(llama, prompts, hk.capture("resid_post.0"))["resid_post.0"]
    norms = states.norm(dim=-1)
    limit = float(norms[0, :7].median()) * 1.0001
    even = lambda values, here: here.positions % 2 == 0  # noqa: E731
    norm = hk.when.norm_above(limit, site="resid_post.0")
    text = hk.when.contains("oat") | hk.when.contains("John")

    def held(when) -> list[list[int]]:
        run = hk.forward(llama, prompts, hk.scale("resid_post.1", 2.0, when=when))
        return [held_of(run, row) for row in range(2)]

    def expected(holds) -> list[list[int]]:
        ids = [llama.tokenizer.encode(prompt) for prompt in prompts]
        rows = []
        for row, tokens in enumerate(ids):
            positions = range(len(tokens))
            rows.append([p for p in positions if holds(bool(norms[row, p] > limit), p, tokens)])
        return rows

    decode = llama.tokenizer.decode
    has = lambda ids, p: "oat" in decode(ids[: p + 1]) or "John" in decode(ids[: p + 1])  # noqa: E731
    assert held(norm & even) == expected(lambda n, p, ids: n and p % 2 == 0)
    assert held(even & norm) == expected(lambda n, p, ids: n and p % 2 == 0)
    assert held(~norm | even) == expected(lambda n, p, ids: not n or p % 2 == 0)
    assert held(~(norm & text)) == expected(lambda n, p, ids: not (n and has(ids, p)))
    assert held(norm & text & ~hk.when.text_ends("e")) == expected(
        lambda n, p, ids: n and has(ids, p) and not decode(ids[: p + 1]).endswith("e")
    )


def test_what_is_not_read_yet_neither_holds_nor_fails(llama):
    late = hk.when.norm_above(1e9, site="resid_post.2")
    run = hk.generate(llama, PROMPTS[0], hk.scale("resid_post.0", 2.0, when=~late), **GREEDY)
    assert held_of(run, 0) == list(range(run.prompt_lengths[0], run.lengths[0] - 1))
    prompt = run.log[run.log["forward"] == 0]
    assert prompt["held"].item() == "" and "not read yet" in prompt["reason"].item()


# ---- decoding modes


def test_beams_ask_as_each_beam_alone_would(llama):
    limit = middle(llama, SCORES["norm"], 0)
    when = hk.when.norm_above(limit, site="resid_post.0")
    hook = hk.steer("resid_post.1", VECTOR, scale=4.0, when=when)

    def by_hand(module, args, output):
        holds = module.read.norm(dim=-1, keepdim=True) > limit
        return torch.where(holds, output + 4 * VECTOR, output)

    first, second = llama.model.model.layers[:2]
    ids = llama.tokenizer(PROMPTS[0], return_tensors="pt")
    handles = [first.register_forward_hook(lambda m, a, output: setattr(second, "read", output))]
    handles.append(second.register_forward_hook(by_hand))
    settings = {**GREEDY, "num_beams": 3}
    try:
        expected = llama.model.generate(**ids, **settings, pad_token_id=0)
    finally:
        for handle in handles:
            handle.remove()
        del second.read
    for way in ({}, {"use_cache": False}):
        run = hk.generate(llama, PROMPTS[0], hook, **settings, **way)
        assert run.tokens.tolist() == expected.tolist()


def test_beams_decide_from_the_prompt_and_refuse_what_was_read_at_the_token_before(llama):
    limit = middle(llama, SCORES["norm"], 2, per_row=OVER["mean"])
    once = hk.when.norm_above(limit, site="resid_post.2", pos=hk.PROMPT)
    each = hk.when.norm_above(limit, site="resid_post.2")
    settings = {**GREEDY, "num_beams": 2}
    run = hk.generate(llama, PROMPTS, hk.steer("resid_post.0", VECTOR, when=once), **settings)
    greedy = hk.generate(llama, PROMPTS, hk.steer("resid_post.0", VECTOR, when=once), **GREEDY)
    for row in range(3):
        assert bool(held_of(run, row)) == bool(held_of(greedy, row))
    with pytest.raises(Unsupported, match="beam search goes back on itself"):
        hk.generate(llama, PROMPTS, hk.steer("resid_post.0", VECTOR, when=each), **settings)


def test_sampled_sequences_of_one_prompt_ask_for_themselves(llama):
    limit = middle(llama, SCORES["norm"], 2)
    when = hk.when.norm_above(limit, site="resid_post.2")
    hook = hk.steer("resid_post.0", VECTOR, scale=1e-6, when=when)
    run = hk.generate(
        llama, PROMPTS[0], hook, hk.capture("resid_post.2"), seed=3, max_new_tokens=5,
        do_sample=True, num_return_sequences=3, eos_token_id=None,
    )  # fmt: skip
    length, norms = run.prompt_lengths[0], run["resid_post.2"].norm(dim=-1)
    log = run.log[(run.log["hook"] == 0) & (run.log["forward"] > 0)].sort_values("forward")
    held = [positions_in(text) for text in log["held"]]
    expected = []
    for forward in range(4):
        for row in range(3):
            position = length + forward
            expected.append([position] if norms[row, position - 1] > limit else [])
    assert held == expected


def test_a_decoding_loop_in_a_block_asks_as_generate_does(llama):
    limit = middle(llama, SCORES["norm"], 2)
    when = hk.when.norm_above(limit, site="resid_post.2")
    hook = hk.steer("resid_post.0", VECTOR, scale=4.0, when=when)
    run = hk.generate(llama, PROMPTS[0], hook, **GREEDY)
    ids = llama.tokenizer.encode(PROMPTS[0])
    cache, chunk = DynamicCache(), ids[:]
    with hk.attach(llama, hook), torch.no_grad():
        for _ in range(NEW):
            logits = llama.model(torch.tensor([chunk]), past_key_values=cache).logits
            ids.append(int(logits[0, -1].argmax()))
            chunk = ids[-1:]
    assert ids == run.tokens[0].tolist()


# ---- the trace


def test_the_trace_says_at_each_step_whether_a_hook_acted_and_what_was_read(llama):
    limit = middle(llama, SCORES["norm"], 0)
    when = hk.when.norm_above(limit, site="resid_post.0")
    hooks = hk.steer("resid_post.1", VECTOR, when=when), hk.boost(5, by=0.1, when=when)
    run = hk.generate(llama, PROMPTS, *hooks, trace=hk.trace(), **GREEDY)
    states = hk.generate(llama, PROMPTS, *hooks, hk.capture("resid_post.0"), **GREEDY)
    norms = states["resid_post.0"].norm(dim=-1)
    table = hk.decisions(run)
    assert len(table) == 3 * NEW
    for _, line in table.iterrows():
        norm = float(norms[line["row"], line["pos"]])
        for hook in hooks:
            if norm > limit:
                assert f"{hook} acted" in line["conditions"]
            else:
                assert f"{hook} did not act: {when}: {norm:.4g}"[:-1] in line["conditions"]
    plain = hk.generate(llama, PROMPTS, trace=hk.trace(), **GREEDY)
    assert set(hk.decisions(plain)["conditions"]) == {""}


# ---- sweeps


def test_a_sweep_asks_as_a_forward_of_each_cell_does(llama):
    limit = middle(llama, SCORES["norm"], 0, per_row=OVER["mean"])
    once = hk.when.norm_above(limit, site="resid_post.0", pos=hk.PROMPT)
    each = hk.when.norm_above(limit, site="resid_post.0")
    metric = hk.metrics.logit(5)
    for when in (once, each):
        for base in ((), hk.steer("resid_post.1", VECTOR, when=when)):
            hooks = lambda layer: hk.steer(f"resid_post.{layer}", VECTOR, pos=-1, when=when)  # noqa: B023, E731
            if base:
                hooks = lambda layer: hk.scale(f"mlp_out.{layer}", 3.0, pos=-1)  # noqa: E731
            table = hk.sweep(llama, PROMPTS, {"layer": [1, 2]}, hooks, metric, base_hooks=base)
            for _, line in table.iterrows():
                prompt = PROMPTS[int(line["row"])]
                extra = (base,) if base else ()
                run = hk.forward(llama, prompt, *extra, hooks(int(line["layer"])), logits="last")
                assert line["logit"] == pytest.approx(float(run.logits[0, -1, 5]), abs=1e-4)
    plan = hk.sweep_plan(
        llama, PROMPTS, {"layer": [1, 2]},
        lambda layer: hk.scale(f"resid_post.{layer}", 2.0, when=each), metric,
    )  # fmt: skip
    assert "a condition reads resid_post.0" in repr(plan)


# ---- what cannot be


def test_a_forward_of_prompts_refuses_a_condition_that_is_read_too_late(llama):
    for when in (
        hk.when.norm_above(1.0, site="resid_post.2"),
        hk.when.norm_above(1.0, site="resid_post.2", pos=hk.PROMPT),
        hk.when.entropy_above(1.0),
    ):
        with pytest.raises(Unsupported, match="computed after resid_post.0"):
            hk.forward(llama, PROMPTS, hk.scale("resid_post.0", 2.0, when=when))
    when = hk.when.norm_above(1.0, site="resid_post.2")
    with pytest.raises(NeverFired, match="acts from the next token on"):
        hk.generate(llama, "Tea", hk.scale("resid_post.0", 2.0, when=when), max_new_tokens=1)


def test_a_state_of_another_text_is_refused():
    """The positions of an encoder are those of the source, which are no positions of the decoder."""
    lm = hk.tiny("t5")
    hook = hk.scale("resid_post.1", 2.0, when=hk.when.norm_above(1.0, site="encoder.resid_post.0"))
    with pytest.raises(Unsupported, match="may be those of another text"), hk.attach(lm, hook):
        pass


def test_a_prompt_in_chunks_is_decided_at_its_end(llama):
    when = hk.when.norm_above(0.0, site="resid_post.0", pos=hk.PROMPT)
    chunked = {**GREEDY, "prefill_chunk_size": 3}
    with pytest.raises(Unsupported, match="read in chunks"):
        hk.generate(llama, PROMPTS[0], hk.scale("resid_post.1", 2.0, when=when), **chunked)
    hook = hk.scale("resid_post.1", 2.0, pos=slice(-1, None), when=when)
    run = hk.generate(llama, PROMPTS[0], hook, **chunked)
    whole = hk.generate(llama, PROMPTS[0], hook, **GREEDY)
    assert run.tokens.tolist() == whole.tokens.tolist()
    assert held_of(run, 0) == held_of(whole, 0) != []


REFUSED = {
    "hk.steer('z.1', V, when=hk.when.norm_above(1.0, site='scores.1'))": (BadHook, "scores"),
    "hk.steer('z.1', V, when=hk.when.norm_above(1.0, site='resid_post'))": (BadHook, "one site"),
    "hk.when.norm_above(-1.0, site='z.1').holds": (AttributeError, "holds"),
    "hk.when.cosine(V, above=1.0)": (BadHook, "never holds"),
    "hk.when.cosine(V)": (BadHook, "one limit"),
    "hk.when.cosine(V, above=0.1, below=0.5)": (BadHook, "combine two conditions with &"),
    "hk.when.cosine(0 * V, above=0.1)": (BadHook, "no direction"),
    "hk.when.reads(V, above=0.1)": (BadHook, "a probe"),
    "hk.when.norm_above(1.0, over='last')": (BadHook, "pos=hk.PROMPT"),
    "hk.when.norm_above(1.0, pos=hk.GENERATED)": (BadHook, "positions of the prompt"),
    "hk.when.norm_above(1.0, pos=hk.PROMPT, over='most')": (BadHook, "over"),
    "hk.when.contains('')": (BadHook, "not empty"),
    "hk.when.contains('a') & 5": (BadHook, "no condition"),
    "hk.scale('z.1', 2.0, when='unsure')": (BadHook, "no condition"),
    "hk.capture('z.1', when=hk.when.contains('a'))": (UnknownKeyword, "run.log"),
    "run(hk.when.cosine(torch.ones(5), above=0.1, site='resid_post.0'))": (BadHook, "vector"),
    "run(hk.when.cosine(torch.ones(5), above=0.1))": (BadHook, "5 numbers"),
    "run(hk.when.norm_above(1.0, site='resid_post.99'))": (hk.errors.HookkitError, "99"),
    "run(hk.when.norm_above(1.0, site='resid_post.0', pos=50))": (OutOfRange, "position 50"),
    "run(hk.when.norm_above(1.0, site='resid_post.0', pos=slice(40, 45)))": (EmptySelection, "no position"),
    "run(hk.when.norm_above(1.0, site='resid_post.0', pos=hk.at('zebra')))": (OutOfRange, "zebra"),
    "run(lambda values, here: 5)": (BadEdit, "True or False"),
    "hk.forward(lm, P, hk.scale(['resid_post.1', 'resid_post.2'], 2.0, when=hk.when.norm_above(1.0, pos=0)))": (BadHook, "2 sites"),
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
def test_what_a_condition_cannot_mean_is_refused_with_the_reason(llama, code):
    def run(when):
        return hk.forward(llama, PROMPTS, hk.scale("resid_post.1", 2.0, when=when))

    names = {"hk": hk, "torch": torch, "V": VECTOR, "lm": llama, "P": PROMPTS, "run": run}
    kind, words = REFUSED[code]
    with pytest.raises(kind, match=words):
        eval(code, names)


def test_zeros_have_the_cosine_zero_and_a_state_that_is_no_number_raises(llama):
    def run(when, value):
        fill = hk.edit("resid_post.0", lambda x: x.index_fill(1, torch.tensor([2]), value))
        return hk.forward(llama, PROMPTS[0], fill, hk.scale("resid_post.1", 2.0, when=when))

    near = hk.when.cosine(DIRECTION, below=0.001, site="resid_post.0")
    assert 2 in held_of(
        run(near & hk.when.cosine(-DIRECTION, below=0.001, site="resid_post.0"), 0.0), 0
    )
    hook = hk.scale("resid_post.1", 2.0, when=hk.when.norm_above(1.0, site="resid_post.0"))
    model = hk.tiny("llama").model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(BadEdit, match="the values of row 0 are NaN"):
        hk.forward(hk.LM(model, llama.tokenizer), PROMPTS[0], hook)


# ---- values


CONDITIONS = [
    hk.when.norm_above(2, site="resid_post.1"),
    hk.when.norm_above(2.0, pos=hk.PROMPT),
    hk.when.norm_above(2.0, site="z.1.2", pos=-1, over="any"),
    hk.when.cosine(DIRECTION, below=0.2, site="resid_post.0", pos=slice(2, 5), over="last"),
    hk.when.cosine(hk.Vector("resid_post.2", DIRECTION, norm=2.0), above=0.1),
    hk.when.reads(hk.types.Probe("resid_post.1", DIRECTION, bias=0.1, norm=1.0), above=0.5),
    hk.when.contains("a, 'b' @ \"c\""),
    hk.when.text_ends(" tea", prompt=False),
    hk.when.contains("a") & ~hk.when.entropy_above(2.0) | hk.when.rank_of(" tea", at_most=3),
    ~(hk.when.contains("a") & hk.when.contains("b")),
    hk.when.contains("a") & hk.when.contains("b") & hk.when.contains("c"),
]


@pytest.mark.parametrize("when", CONDITIONS, ids=str)
def test_a_condition_is_a_value_in_json_and_in_a_hooks_text(when):
    for hook in (hk.scale("mlp_out.1", 2.0, when=when), hk.ban(7, when=when)):
        assert hk.types.Hook.from_json(hook.to_json()) == hook
        assert hk.parse_hook(hk.format_hook(hook)) == hook
        assert hash(hook) == hash(hk.types.Hook.from_json(hook.to_json()))
        assert "when=" in str(hook) and "when" in hook._repr_html_()
        assert hook != hk.scale("mlp_out.1", 2.0)


def test_conditions_without_tensors_have_a_short_text():
    for when in (CONDITIONS[0], CONDITIONS[1], *CONDITIONS[6:]):
        text = hk.format_hook(hk.ablate("z.1", when=when, pos=-1))
        assert text.startswith("ablate:z.1@when=") and str(when) in text
    assert hk.parse_hook("scale:mlp_out.4*0.5@when=contains('tea') & ~text_ends('.')") == hk.scale(
        "mlp_out.4", 0.5, when=hk.when.contains("tea") & ~hk.when.text_ends(".")
    )
    for spoiled in ("contains('a') & 5", "~3", "'a' | 'b'", "contains(5)"):
        with pytest.raises(BadHook):
            hk.parse_hook(f"ablate:z.1@when={spoiled}")


def test_different_conditions_are_not_equal():
    same = [hk.when.norm_above(2.0, site="resid_post.1"), *CONDITIONS[1:]]
    for left, when in enumerate(same):
        for right, other in enumerate(CONDITIONS):
            assert (when == other) == (left == right)
    assert hk.when.contains("a") != hk.when.text_ends("a")


def test_a_state_of_the_decoder_switches_no_edit_at_the_positions_of_the_source():
    lm = hk.tiny("t5")
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    state = hk.when.norm_above(0.1, site="resid_post.0")
    run = hk.forward(lm, prompt, hk.scale("cross_z.1", 0.0, when=state))
    assert not torch.equal(run.logits, hk.forward(lm, prompt).logits)
    for site in ("cross_k.1", "encoder.resid_post.0"):
        with pytest.raises(hk.errors.Unsupported, match="positions may be those of another text"):
            hk.forward(lm, prompt, hk.scale(site, 0.5, when=state))
