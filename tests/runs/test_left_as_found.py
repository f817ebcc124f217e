"""The model is left as found: blocks in any order, threads, tasks, streams, Ctrl-C, and copies of what came out.

Expected numbers come from plain transformers and hooks written by hand.
"""

import asyncio
import contextlib
import contextvars
import copy
import gc
import itertools
import pickle
import random
import signal
import threading
import time

import by_hand
import pytest
import torch
from conftest import hooks_on
from programs import Program, same_state, state_of
from transformers import LogitsProcessor

import hookkit as hk
from hookkit.errors import HookkitError, Unsupported

IDS, OTHER = [5, 6, 7, 8], [20, 21, 22]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def plain(lm, ids=IDS):
    return by_hand.logits(lm.model, ids)


def steered(lm, ids=IDS, scale=1.0):
    """Logits of plain transformers with a hand-written hook that adds the vector after block 1."""
    return by_hand.edited_logits(lm.model, ids, "resid_post", 1, lambda x: x + scale * VECTOR)


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def answer_of(lm, *hooks):
    """What a plain forward gives: its logits, or the error of hookkit's."""
    try:
        return by_hand.logits(lm.model, IDS)
    except HookkitError as error:
        return str(error)


# ---- any order


def test_blocks_that_are_left_in_another_order_leave_nothing_and_the_one_that_stays_goes_on_acting(
    llama,
):
    before = state_of(llama.model)
    one, two = (
        hk.attach(llama, hk.scale("pattern.1", 0.5)),
        hk.attach(llama, hk.scale("pattern.1", 3.0)),
    )
    one.__enter__()
    two.__enter__()
    both = plain(llama)
    one.__exit__(None, None, None)
    alone = plain(llama)
    two.__exit__(None, None, None)
    assert torch.allclose(
        both, hk.forward(llama, [IDS], hk.scale("pattern.1", 1.5)).logits, atol=1e-5
    )
    assert torch.allclose(
        alone, hk.forward(llama, [IDS], hk.scale("pattern.1", 3.0)).logits, atol=1e-5
    )
    assert same_state(llama.model, before) == []


def test_what_others_put_on_the_model_in_a_block_stays(llama):
    calls = []
    with hk.attach(llama, hk.capture("pattern.1")) as block:
        inner = llama.model.generate
        llama.model.generate = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
        plain(llama)
    assert block["pattern.1"].shape == (1, 4, 4, 4)
    out = llama.model.generate(torch.tensor([IDS]), **SETTINGS, pad_token_id=0)
    del llama.model.generate
    assert calls == [1]
    assert torch.equal(out, llama.model.generate(torch.tensor([IDS]), **SETTINGS, pad_token_id=0))


@pytest.mark.parametrize("seed", range(8))
def test_any_program_of_blocks_and_runs_leaves_the_model_as_it_was(llama, seed):
    for number in range(25):
        Program(llama, random.Random(1000 * seed + number)).run()


def test_a_compiled_model_runs_compiled_again_after_the_last_block(llama):
    from torch._dynamo import eval_frame

    def stance():
        return eval_frame._stance.stance

    one, two = (
        hk.attach(llama, hk.scale("resid_post.1", 0.5)),
        hk.attach(llama, hk.scale("resid_post.1", 0.5)),
    )
    for first, second in ((one, two), (two, one)):
        one.__enter__()
        two.__enter__()
        plain(llama)
        first.__exit__(None, None, None)
        assert stance() == "force_eager"
        second.__exit__(None, None, None)
        assert stance() == "default"


def test_a_thousand_blocks_and_dropped_streams_keep_nothing(llama):
    from hookkit.models import overrides

    def count():
        gc.collect()
        kinds = (overrides.WrappedMethod, overrides.Overrides, overrides.Scope, threading.Thread)
        return sum(type(thing) in kinds for thing in gc.get_objects()) + len(overrides._SHARED)

    def use():
        with hk.attach(llama, hk.capture("pattern.1")):
            plain(llama)
        iter(hk.stream(llama, [IDS], hk.ban(9), **SETTINGS)).__next__()

    before, threads = None, threading.active_count()
    for number in range(40):
        use()
        if number == 4:
            before = count()
    assert count() <= before
    assert threading.active_count() == threads


# ---- threads and tasks


def test_each_thread_gets_its_own_numbers(llama):
    """Runs of several threads at once, and a plain forward beside them."""
    scales = (1.0, -2.0, 0.5)
    want = [steered(llama, scale=scale) for scale in scales]
    unedited = plain(llama)
    wrong = []

    def work(number):
        for _ in range(15):
            run = hk.forward(
                llama,
                [IDS],
                hk.steer("resid_post.1", VECTOR, scale=scales[number]),
                hk.capture("pattern"),
            )
            if not torch.allclose(run.logits, want[number], atol=1e-5):
                wrong.append(number)

    def read():
        for _ in range(15):
            if not torch.equal(by_hand.logits(llama.model, IDS), unedited):
                wrong.append("plain")

    before = state_of(llama.model)
    in_threads(lambda: work(0), lambda: work(1), lambda: work(2), read)
    assert wrong == []
    assert same_state(llama.model, before) == []


def test_sweeps_and_lenses_of_threads_are_those_of_one(llama):
    def lens():
        return hk.logit_lens(llama, [IDS])

    def sweep():
        return hk.sweep(
            llama,
            [IDS],
            {"layer": [0, 1, 2]},
            lambda layer: hk.ablate(f"mlp_out.{layer}"),
            hk.metrics.prob(9),
        )

    want, results, unedited = (lens(), sweep()), [[], [], []], plain(llama)
    in_threads(
        lambda: results[0].extend(lens() for _ in range(4)),
        lambda: results[1].extend(sweep() for _ in range(4)),
        lambda: results[2].extend(torch.equal(plain(llama), unedited) for _ in range(40)),
    )
    assert [len(each) for each in results] == [4, 4, 40]
    assert all(table.equals(want[0]) for table in results[0])
    assert all(table.equals(want[1]) for table in results[1])
    assert all(results[2])


def test_a_forward_of_another_thread_in_an_open_block_is_refused_and_in_its_own_block_has_its_own_hooks(
    llama,
):
    said, before, want = [], state_of(llama.model), steered(llama, scale=-2.0)

    def other():
        said.append(answer_of(llama))
        with hk.attach(llama, hk.steer("resid_post.1", VECTOR, scale=-2.0)):
            said.append(by_hand.logits(llama.model, IDS))
        said.append(hk.forward(llama, [IDS], hk.steer("resid_post.1", VECTOR, scale=-2.0)).logits)

    with hk.attach(llama, hk.steer("resid_post.1", VECTOR)):
        in_threads(other)
        own = plain(llama)
    assert "a block of hk.attach is open on this model in another thread or task" in said[0]
    assert torch.allclose(said[1], want, atol=1e-5)
    assert torch.allclose(said[2], want, atol=1e-5)
    assert torch.allclose(own, steered(llama), atol=1e-5)
    assert same_state(llama.model, before) == []


def test_each_task_has_its_own_block(llama):
    said = {}

    async def work(name, scale, wait):
        with hk.attach(llama, hk.steer("resid_post.1", VECTOR, scale=scale)):
            for _ in range(3):
                await asyncio.sleep(wait)
            said[name] = await asyncio.to_thread(by_hand.logits, llama.model, IDS)

    async def bystander():
        await asyncio.sleep(0.002)
        said["plain"] = answer_of(llama)

    async def main():
        await asyncio.gather(
            work("one", 1.0, 0.003),
            work("two", -2.0, 0.002),
            work("three", 0.5, 0.001),
            bystander(),
        )

    before = state_of(llama.model)
    asyncio.run(main())
    assert "in another thread or task" in said["plain"]
    for name, scale in (("one", 1.0), ("two", -2.0), ("three", 0.5)):
        assert torch.allclose(said[name], steered(llama, scale=scale), atol=1e-5)
    assert same_state(llama.model, before) == []


def test_a_block_that_a_cell_of_a_notebook_enters_acts_in_the_next_cells(llama):
    block = hk.attach(llama, hk.steer("resid_post.1", VECTOR))

    async def cell(function):
        return function()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(
        cell(block.__enter__)
    )  # each cell is a task, and has a context of its own
    in_block = loop.run_until_complete(cell(lambda: plain(llama)))
    run = loop.run_until_complete(cell(lambda: hk.forward(llama, [IDS]).logits))
    steps = loop.run_until_complete(cell(lambda: list(hk.stream(llama, [IDS], **SETTINGS))))
    loop.run_until_complete(cell(lambda: block.__exit__(None, None, None)))
    loop.close()
    assert torch.allclose(in_block, steered(llama), atol=1e-5)
    assert torch.allclose(run, steered(llama), atol=1e-5)
    tokens = (
        hk.generate(llama, [IDS], hk.steer("resid_post.1", VECTOR), **SETTINGS).tokens[0].tolist()
    )
    assert steps[-1].text[0] == llama.text(tokens)


class Calling(LogitsProcessor):
    """A user's processor that runs the model on another text in the midst of a generate."""

    def __init__(self, function):
        self.function, self.answers = function, []

    def __call__(self, input_ids, scores):
        self.answers.append(self.function())
        return scores


@pytest.mark.parametrize("kind", ["plain", "forward", "generate"])
def test_a_forward_in_a_logits_processor_is_no_step_of_the_generate(llama, kind):
    hooks = [hk.steer("resid_post.1", VECTOR), hk.capture("resid_post.1")]
    want, unedited = hk.generate(llama, [IDS], *hooks, **SETTINGS), plain(llama, OTHER)
    inner = {
        "plain": lambda: plain(llama, OTHER),
        "forward": lambda: hk.forward(llama, [OTHER]).logits,
        "generate": lambda: hk.generate(llama, [OTHER], **SETTINGS).logits[:, :1],
    }[kind]
    calling = Calling(inner)
    run = hk.generate(llama, [IDS], *hooks, logits_processor=[calling], **SETTINGS)
    assert torch.equal(run.tokens, want.tokens)
    assert torch.equal(run["resid_post.1"], want["resid_post.1"])
    assert len(calling.answers) == 4
    assert all(
        torch.allclose(answer[:, -1], unedited[:, -1], atol=1e-5) for answer in calling.answers
    )


def test_a_forward_in_the_midst_of_a_generate_of_an_open_block_is_refused(llama):
    calling = Calling(lambda: plain(llama, OTHER))
    with (
        pytest.raises(Unsupported, match="while a generate of the same block runs"),
        hk.attach(llama, hk.steer("resid_post.1", VECTOR)),
    ):
        llama.model.generate(
            torch.tensor([IDS]), logits_processor=[calling], **SETTINGS, pad_token_id=0
        )


def test_seeded_draws_of_threads_are_those_of_each_alone(llama):
    given = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    want = [hk.generate(llama, [IDS], seed=seed, **given).tokens for seed in range(3)]
    wrong = []

    def work(seed):
        for _ in range(5):
            if not torch.equal(hk.generate(llama, [IDS], seed=seed, **given).tokens, want[seed]):
                wrong.append(seed)

    in_threads(*(lambda seed=seed: work(seed) for seed in range(3)))
    assert wrong == []


# ---- streams


def test_the_body_of_a_stream_has_the_plain_model_and_streams_can_take_turns(llama):
    hooks = [hk.steer("resid_post.1", VECTOR), hk.scale("pattern.1", 0.5)]
    one, two = hk.stream(llama, [IDS], *hooks, **SETTINGS), hk.stream(llama, [OTHER], **SETTINGS)
    before, unedited, edited = state_of(llama.model), plain(llama, OTHER), steered(llama, OTHER)
    for _ in zip(one, two, strict=True):
        assert torch.equal(hk.forward(llama, [OTHER]).logits, unedited)
        with hk.attach(llama, hk.steer("resid_post.1", VECTOR)):
            assert torch.allclose(plain(llama, OTHER), edited, atol=1e-5)
        assert torch.equal(plain(llama, OTHER), unedited)
        assert hk.generate(llama, [OTHER], **SETTINGS).tokens.shape == (1, 7)
    assert torch.equal(one.run.tokens, hk.generate(llama, [IDS], *hooks, **SETTINGS).tokens)
    assert torch.equal(two.run.tokens, hk.generate(llama, [OTHER], **SETTINGS).tokens)
    assert same_state(llama.model, before) == []


def test_a_stream_is_generate_under_autocast_a_default_device_and_a_seed_of_torchs(llama):
    given = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None}
    for context in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        torch.device("cpu"),
    ):
        with context:
            torch.manual_seed(3)
            whole = hk.generate(llama, [IDS], **given)
            torch.manual_seed(3)
            steps = hk.stream(llama, [IDS], logits="all", **given)
            list(steps)
        assert steps.run.logits.dtype == whole.logits.dtype
        assert torch.equal(steps.run.logits, whole.logits)
        assert torch.equal(steps.run.tokens, whole.tokens)


def test_what_is_drawn_in_the_body_of_a_seeded_stream_changes_neither(llama):
    given = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None, "seed": 4}
    torch.manual_seed(0)
    want = [torch.randn(2) for _ in range(6)]
    torch.manual_seed(0)
    steps = hk.stream(llama, [IDS], **given)
    drawn = [torch.randn(2) for _ in steps]
    drawn.append(torch.randn(2))
    assert torch.equal(torch.stack(drawn), torch.stack(want))
    assert torch.equal(steps.run.tokens, hk.generate(llama, [IDS], **given).tokens)


@pytest.mark.parametrize("way", ["break", "raise", "drop", "close"])
def test_a_stream_that_is_left_early_cleans_up(llama, way):
    before, threads = state_of(llama.model), threading.active_count()
    steps = iter(hk.stream(llama, [IDS], hk.scale("pattern.1", 0.5), **SETTINGS))
    next(steps)
    assert threading.active_count() == threads + 1
    if way == "raise":
        with pytest.raises(ZeroDivisionError):
            steps.throw(ZeroDivisionError())
    elif way == "close":
        steps.close()
    else:
        del steps
    assert threading.active_count() == threads
    assert same_state(llama.model, before) == []


# ---- Ctrl-C


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_ctrl_c_while_python_waits_for_a_thread_of_a_stream_is_ctrl_c(llama, monkeypatch, at):
    """Inside `threading.Condition.wait` Python itself turns it into "release unlocked lock"."""
    before, unedited = state_of(llama.model), plain(llama)
    restored, count = threading.Condition._acquire_restore, itertools.count(1)

    def interrupted(self, state):
        if threading.current_thread() is threading.main_thread() and next(count) == at:
            raise KeyboardInterrupt
        restored(self, state)

    monkeypatch.setattr(threading.Condition, "_acquire_restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(hk.stream(llama, [IDS], hk.scale("resid_post", 0.9), **SETTINGS))
    monkeypatch.undo()
    assert state_of(llama.model) == before and torch.equal(plain(llama), unedited)


INTERRUPTED_ENTER = """
def enter(self):
    value = next(self.gen)
    if is_pressed_in(self.gen.__name__):
        raise KeyboardInterrupt
    return value
"""


def test_ctrl_c_while_torch_has_set_a_mode_aside_leaves_no_mode(llama, monkeypatch):
    """torch puts the mode back when Python frees the generator that set it aside."""
    before, pressed = state_of(llama.model), []

    def is_pressed_in(name):
        now = name == "_pop_mode_temporarily" and not pressed
        pressed.extend([True] * now)
        return now

    names = {"is_pressed_in": is_pressed_in}
    exec(compile(INTERRUPTED_ENTER, contextlib.__file__, "exec"), names)
    monkeypatch.setattr(contextlib._GeneratorContextManager, "__enter__", names["enter"])
    with pytest.raises(KeyboardInterrupt):
        hk.forward(llama, [IDS], hk.scale("pattern.1", 0.5))
    monkeypatch.undo()
    gc.collect()
    assert pressed and not torch.overrides._get_current_function_mode_stack()
    assert state_of(llama.model) == before


def test_ctrl_c_at_any_moment_ends_in_a_clean_model(llama):
    draw = random.Random(0)
    before, unedited = state_of(llama.model), plain(llama)
    hooks = [hk.scale("resid_post", 0.9), hk.scale("pattern.1", 0.5)]
    uses = [
        lambda: hk.forward(llama, [IDS], *hooks),
        lambda: hk.generate(llama, [IDS], *hooks, **SETTINGS),
        lambda: list(hk.stream(llama, [IDS], *hooks, **SETTINGS)),
    ]
    for use in uses:
        use()  # what is imported once is imported
    pressed = 0
    for number in range(45):
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, 0.03))
            end = time.monotonic() + 2
            while True:
                uses[number % 3]()
                if time.monotonic() > end:  # Python ignores what is raised in a finaliser
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pressed += 1
        assert same_state(llama.model, before) == []
        assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()
    assert pressed == 45
    assert torch.equal(plain(llama), unedited)


@pytest.fixture(autouse=True)
def the_alarm_is_ctrl_c():
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def test_every_step_of_leaving_is_done_when_one_is_interrupted(llama, monkeypatch):
    from hookkit.models import overrides

    before, real, calls = hooks_on(llama.model), overrides._remove_hook, []

    def remove(*args):
        calls.append(args)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(overrides, "_remove_hook", remove)
    with pytest.raises(KeyboardInterrupt):
        hk.forward(llama, [IDS], hk.scale("resid_post", 0.9), hk.scale("pattern.1", 0.5))
    assert len(calls) > 5
    assert hooks_on(llama.model) == before


# ---- copies


def test_a_run_can_be_copied_and_pickled(llama):
    run = hk.generate(
        llama, [IDS, OTHER], hk.capture("resid_post.1"), hk.ban(9), trace=hk.trace(), **SETTINGS
    )
    deep, shallow, read = copy.deepcopy(run), copy.copy(run), pickle.loads(pickle.dumps(run))
    for other in (deep, shallow, read):
        assert torch.equal(other["resid_post.1"], run["resid_post.1"])
        assert torch.equal(other.logits, run.logits)
        assert other.text == run.text
        assert other.log.equals(run.log)
        assert hk.decisions(other).equals(hk.decisions(run))
    assert deep.lm is llama
    assert deep["resid_post.1"].data_ptr() != run["resid_post.1"].data_ptr()
    assert read.lm.model is not llama.model
    assert torch.equal(plain(read.lm), plain(llama))
    captured = run.captured("resid_post.1")
    assert pickle.loads(pickle.dumps(captured)) == copy.deepcopy(captured) == captured
    hook = hk.steer("resid_post.1", VECTOR)
    again = pickle.loads(pickle.dumps(hook))
    assert torch.equal(
        hk.forward(llama, [IDS], again).logits, hk.forward(llama, [IDS], hook).logits
    )


def test_a_run_on_the_path_of_a_gradient_a_block_and_a_stream_say_that_they_cannot_be_copied(llama):
    run = hk.forward(llama, [IDS], hk.capture("resid_post.1", grad=True))
    with pytest.raises(Unsupported, match="on the path of a gradient"):
        copy.deepcopy(run)
    with hk.attach(llama, hk.capture("resid_post.1")) as block:
        plain(llama)
    with pytest.raises(Unsupported, match="a block cannot be copied"):
        pickle.dumps(block)
    with pytest.raises(Unsupported, match="a stream cannot be copied"):
        copy.deepcopy(hk.stream(llama, [IDS]))


def test_what_comes_out_under_inference_mode_can_be_used_by_autograd(llama):
    with torch.inference_mode():
        runs = [
            hk.forward(llama, [IDS, OTHER], hk.capture("resid_post.1")),
            hk.generate(llama, [IDS], **SETTINGS),
        ]
    for run in runs:
        weight = torch.ones(run.logits.shape[-1], requires_grad=True)
        (run.logits * weight).sum().backward()
        assert torch.allclose(weight.grad, run.logits.sum((0, 1)))
        assert not run.tokens.is_inference()
    assert torch.equal(runs[0].logits[0, :4], plain(llama)[0])


def test_a_forward_of_a_context_that_was_made_before_the_block_belongs_to_its_thread(llama):
    context = contextvars.copy_context()
    with hk.attach(llama, hk.steer("resid_post.1", VECTOR)):
        answer = context.run(plain, llama)
    assert torch.allclose(answer, steered(llama), atol=1e-5)
