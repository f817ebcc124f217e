"""Steps of the engine: parts of prompts, slots, preemption, cached prefixes, sampling, ends."""

import threading

import pytest
import torch
from conftest import TEXTS
from served_models import PROMPTS, compare, difference, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

LONG = [TEXTS[0], TEXTS[1][:70], TEXTS[2][:90]]  # 16 tokens a step: each is read in several
SITES = ["resid_post.1", "z.2", "mlp_post.0", "logits"]


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(seed))


def steered(**options) -> hk.types.Hook:
    return hk.steer("resid_post.0", vector(), scale=8.0, **options)


class Recorder:
    """An edit's function that writes into a file which positions of which rows it was called for."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __call__(self, values: torch.Tensor, here: hk.types.EditContext) -> torch.Tensor:
        with open(self.path, "a") as file:
            for index, row in enumerate(here.rows):
                for position in here.positions[index].tolist():
                    if position >= 0:
                        file.write(f"{row} {position}\n")
        return values * 0.9

    def calls(self) -> dict[str, int]:
        with open(self.path) as file:
            lines = file.read().splitlines()
        return {line: lines.count(line) for line in lines}


# ---- parts of prompts, slots, preemption


def test_prompts_that_are_read_in_parts(narrow, reference):
    for hooks in (
        [steered()],
        [steered(pos=-1), hk.force(" coffee", step=2)],
        [steered(pos=hk.at(" store", which=0)), hk.patch("mlp_out.1", "Tea", pos=0)],
        [hk.ban("e", when=hk.when.contains("milk")), hk.scale("z.1.3", 0.0, pos=slice(14, 18))],
        [steered(when=hk.when.norm_above(30.0, site="resid_post.1", pos=hk.PROMPT))],
    ):
        prompts = LONG[:2] if any("store" in str(hook) for hook in hooks) else LONG
        compare(
            narrow, reference, prompts, hk.capture(SITES), *hooks, hk.capture(SITES, name="after")
        )


def test_five_requests_in_two_slots(narrow, reference):
    prompts = [*PROMPTS, "We love deep learning"]
    hooks = [steered(rows=[0, 4]), hk.force(" milk", step=1, rows=[1, 3]), hk.capture(SITES)]
    compare(narrow, reference, prompts, *hooks)


@pytest.mark.parametrize(
    "condition",
    [None, hk.when.contains("e", prompt=False), hk.when.norm_above(30.0, site="resid_post.2")],
    ids=["always", "text", "state"],
)
def test_a_request_that_the_engine_preempts_is_read_again_with_its_hooks(
    condition, narrow, reference, tmp_path
):
    recorder = Recorder(tmp_path / "calls.txt")
    prompts = [TEXTS[0], TEXTS[1]]
    lengths = [len(reference.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert max(lengths) < 100 < sum(lengths) + 80, lengths
    hooks = [
        hk.edit("mlp_out.0", recorder),
        steered(when=condition),
        hk.force(" coffee", step=[3, 20]),
        hk.force(hk.word(" the city of", exact=True), step=30),
        hk.ban("e", when=hk.when.text_ends("k")),
        hk.capture(SITES),
    ]
    arguments = {"max_new_tokens": 44, "eos_token_id": None}
    expected = hk.generate(reference, prompts, *hooks, **arguments)
    (tmp_path / "calls.txt").unlink()
    run = hk.generate(narrow, prompts, *hooks, **arguments)
    assert max(recorder.calls().values()) > 1, "no request was preempted"
    assert run.generated == expected.generated
    assert difference(run.logits, expected.logits) < 1e-3
    for site in SITES:
        assert torch.equal(run.captured(site).positions, expected.captured(site).positions)
        assert difference(run[site], expected[site]) < 1e-4


# ---- prefixes that the engine has kept


def test_a_capture_after_an_earlier_run_of_the_prompt_has_all_positions(cached, reference):
    hk.generate(cached, LONG, max_new_tokens=4)
    hk.generate(cached, LONG, hk.capture("resid_post.1"), max_new_tokens=4)
    run, _ = compare(cached, reference, LONG, hk.capture(SITES))
    lengths = [len(row) for row in run.prompts]
    counts = (run.captured("resid_post.1").positions >= 0).sum(dim=1).tolist()
    assert counts == [length + 7 for length in lengths]


def test_an_unsteered_run_after_a_steered_one_is_unsteered(cached, reference):
    compare(cached, reference, LONG, steered())
    compare(cached, reference, LONG)
    plain = hk.generate(cached, LONG, max_new_tokens=8, logits=False)
    assert plain.generated == hk.generate(reference, LONG, max_new_tokens=8).generated
    compare(cached, reference, LONG, steered())
    again = hk.generate(cached, LONG, max_new_tokens=8, logits=False)
    assert again.generated == plain.generated


def test_identical_prompts_in_one_run_have_their_own_hooks(cached, reference):
    prompts = [LONG[0], LONG[0], LONG[0]]
    run, _ = compare(cached, reference, prompts, hk.capture(SITES), steered(rows=1))
    assert run.generated[0] == run.generated[2]
    assert difference(run["z.2"][0], run["z.2"][2]) < 1e-5


def test_a_prompt_that_is_returned_several_times(cached, served):
    for lm in (cached, served):
        run = hk.generate(
            lm, LONG[:2], hk.capture("resid_post.1"), steered(rows=1), num_return_sequences=3,
            do_sample=True, temperature=1.9, seed=3, max_new_tokens=5,
        )  # fmt: skip
        assert len(run.generated) == 6 and len(set(run.generated)) > 2
        assert list(run.prompt_rows) == [0, 0, 0, 1, 1, 1]
        alone = hk.generate(lm, LONG[0], hk.capture("resid_post.1"), max_new_tokens=1)
        count = len(run.prompts[0])
        for row in range(3):
            assert difference(run["resid_post.1"][row, :count], alone["resid_post.1"][0]) < 1e-5


# ---- sampling, and ends


def test_a_seed_repeats_its_draws_and_another_does_not(served):
    arguments = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    first = hk.generate(served, PROMPTS, steered(), seed=1, **arguments)
    again = hk.generate(served, PROMPTS, steered(), seed=1, **arguments)
    other = hk.generate(served, PROMPTS, steered(), seed=2, **arguments)
    assert first.generated == again.generated != other.generated
    assert torch.equal(first.logits, again.logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "top_k": 2},
        {"do_sample": True, "top_p": 0.2},
        {"do_sample": True, "min_p": 0.9},
        {"repetition_penalty": 1.8},
        {"min_new_tokens": 8},
        {},
    ],
    ids=str,
)
def test_a_forced_token_is_chosen_in_every_mode(arguments, served):
    end = served.tokenizer.eos_token
    run = hk.generate(
        served, PROMPTS, hk.force(" the", step=[0, 1, 2, 5]), max_new_tokens=8, seed=0, **arguments
    )
    the = served.tokenizer.encode(" the")
    for row, length in enumerate(run.prompt_lengths):
        generated = run.tokens[row, length:].tolist()
        assert [generated[step] for step in (0, 1, 2, 5)] == the * 4
    assert end not in run.generated[0] or "min_new_tokens" not in arguments


def test_the_rules_of_generate_are_those_of_transformers(served, reference):
    plain = hk.generate(reference, PROMPTS, max_new_tokens=8)
    eos = int(plain.tokens[0, plain.prompt_lengths[0] + 3])
    for arguments in (
        {"repetition_penalty": 1.8},
        {"eos_token_id": eos},
        {"eos_token_id": [eos, 5], "min_new_tokens": 6},
        {"max_length": 28, "max_new_tokens": None},
    ):
        compare(served, reference, PROMPTS, hk.capture("resid_post.1"), steered(), **arguments)
    text = plain.generated[2].replace("�", "")[:6].strip() or plain.generated[2]
    run = hk.generate(served, PROMPTS, stop_strings=[text], max_new_tokens=8)
    expected = hk.generate(reference, PROMPTS, stop_strings=[text], max_new_tokens=8)
    assert run.generated == expected.generated


def test_a_row_that_ends_early_keeps_its_captures(served, reference):
    hooks = [hk.force("</s>", step=2, rows=[0, 3]), hk.capture(SITES)]
    run, _ = compare(served, reference, PROMPTS, *hooks)
    assert run.mask.sum(dim=1).tolist() != [run.tokens.shape[1]] * 4


def test_two_threads_take_turns(served, reference):
    expected = {
        scale: hk.generate(
            reference, PROMPTS, hk.steer("resid_post.1", vector(), scale=scale), max_new_tokens=8
        ).generated
        for scale in (4.0, -4.0)
    }
    results: dict[float, list[list[str]]] = {4.0: [], -4.0: []}

    def generate(scale: float) -> None:
        for _ in range(4):
            hook = hk.steer("resid_post.1", vector(), scale=scale)
            run = hk.generate(served, PROMPTS, hook, max_new_tokens=8)
            results[scale].append(run.generated)

    threads = [threading.Thread(target=generate, args=(scale,)) for scale in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {scale: [texts] * 4 for scale, texts in expected.items()}
