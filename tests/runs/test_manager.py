"""The block: what it owes its caller, whoever runs the model inside it."""

import contextvars
import copy
import gc
import threading
import weakref

import by_hand
import pytest
import torch
from conftest import FAMILIES, PROMPTS, hooks_on, tiny
from torch import nn

import hookkit as hk
from hookkit.errors import (
    BadEdit,
    BadHook,
    EmptySelection,
    MissingSite,
    NeverFired,
    NotCaptured,
    OutOfRange,
    UnknownSite,
    Unsupported,
)

SITE = "resid_post.1"
VECTOR = torch.linspace(-1, 1, 32)


def ids_of(lm, text=PROMPTS[0]):
    return torch.tensor([lm.tokenizer.encode(text)])


@torch.no_grad()
def run(lm, text=PROMPTS[0], **more):
    return lm.model(ids_of(lm, text), **more)


def layers(lm):
    return lm.model.model.layers if lm.family.name == "llama" else lm.model.transformer.h


# ---- on and off


def test_one_bad_hook_leaves_none_on_the_model(llama):
    before = hooks_on(llama.root)
    with (
        pytest.raises(OutOfRange, match="resid_post.9 was asked for"),
        hk.attach(llama, hk.capture(SITE), hk.scale("resid_post.9", 2.0)),
    ):
        pass
    with (
        pytest.raises(BadHook, match="has hooks=3: give hooks, such as hk.capture"),
        hk.attach(llama, hk.capture(SITE), 3),
    ):
        pass
    assert hooks_on(llama.root) == before


def test_nothing_is_registered_before_the_block_or_after_it(llama):
    before = hooks_on(llama.root)
    manager = hk.attach(llama, hk.capture(SITE))
    assert hooks_on(llama.root) == before
    with manager:
        assert hooks_on(llama.root) != before
        run(llama)
    assert hooks_on(llama.root) == before


def test_a_failure_while_hooks_go_on_takes_them_all_off(llama, monkeypatch):
    before = hooks_on(llama.root)
    last = llama.submodule("model.layers.2")
    monkeypatch.setattr(last, "register_forward_hook", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), hk.attach(llama, hk.capture("resid_post")):
        pass
    monkeypatch.undo()
    assert hooks_on(llama.root) == before


def test_a_users_own_hooks_stay_and_see_the_edit(lm):
    seen = []
    mine = layers(lm)[1].register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    try:
        with hk.attach(lm, hk.steer(SITE, VECTOR)):
            run(lm)
        run(lm)
    finally:
        mine.remove()
    assert torch.equal(seen[0], seen[1] + VECTOR)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_hidden_states_show_the_edit(family, small_tokenizer):
    lm = hk.LM(
        tiny(family), small_tokenizer
    )  # its own, since asking for hidden states installs hooks for good
    plain = run(lm, output_hidden_states=True).hidden_states
    with hk.attach(lm, hk.steer("resid_post.0", VECTOR)):
        edited = run(lm, output_hidden_states=True).hidden_states
    assert torch.allclose(edited[1], plain[1] + VECTOR, atol=1e-5)
    assert torch.equal(run(lm, output_hidden_states=True).hidden_states[1], plain[1])


def test_a_block_can_be_entered_again_and_starts_anew(lm):
    manager = hk.attach(lm, hk.capture(SITE))
    with manager:
        run(lm)
    first = manager[SITE]
    with manager, manager:
        run(lm, PROMPTS[2])
    assert manager[SITE].shape[1] != first.shape[1]
    assert len(manager.log) == 1


def test_an_outer_block_acts_first_and_hooks_of_one_block_in_the_order_given(lm):
    inner = [hk.capture(SITE, name="a"), hk.scale(SITE, 2.0), hk.capture(SITE, name="b")]
    with hk.attach(lm, hk.steer(SITE, VECTOR)), hk.attach(lm, *inner) as manager:
        run(lm)
    with hk.attach(lm, hk.capture(SITE)) as plain:
        run(lm)
    assert torch.equal(manager[SITE, "a"], plain[SITE] + VECTOR)
    assert torch.equal(manager[SITE, "b"], (plain[SITE] + VECTOR) * 2.0)


def test_a_run_inside_a_block_is_of_the_edited_model(lm):
    with hk.attach(lm, hk.steer(SITE, VECTOR)):
        inside = hk.forward(lm, PROMPTS[0], hk.capture(SITE))
    assert torch.equal(inside[SITE], hk.forward(lm, PROMPTS[0], hk.capture(SITE))[SITE] + VECTOR)


def test_modules_that_a_hooks_function_calls_are_not_hooked(lm):
    calls = []

    def edit(x):
        calls.append(1)
        lm.model.lm_head(x)
        layers(lm)[1].mlp(x)
        return x

    hooks = [hk.edit("mlp_out.1", edit), hk.edit("lm_head", lambda x: calls.append(2) or x)]
    with hk.attach(lm, *hooks):
        run(lm)
    assert calls == [1, 2]


def test_a_model_that_carries_a_blocks_hooks_cannot_be_copied(llama):
    with (
        pytest.raises(
            Unsupported, match="carries the hooks of a block, which a copy could not remove"
        ),
        hk.attach(llama, hk.capture(SITE)),
    ):
        copy.deepcopy(llama.model)


def test_an_exception_of_the_users_keeps_its_type_and_says_where_it_was(lm):
    with pytest.raises(ZeroDivisionError) as caught:
        hk.forward(lm, PROMPTS, hk.edit("mlp_out.1", lambda x: 1 / 0))
    assert caught.value.__notes__ == ["in edit(mlp_out.1, <lambda>) at mlp_out.1, forward 0"]


def test_an_exception_in_the_block_is_not_hidden_by_a_hook_that_never_fired(llama):
    with pytest.raises(KeyError, match="mine"), hk.attach(llama, hk.capture(SITE)):
        raise KeyError("mine")


def test_after_an_interrupt_the_next_forward_starts_afresh(lm):
    hits = []

    def edit(x):
        hits.append(x.shape)
        if len(hits) == 1:
            raise KeyboardInterrupt
        return x

    with hk.attach(lm, hk.edit(SITE, edit), hk.capture("resid_post.2")) as manager:
        with pytest.raises(KeyboardInterrupt):
            run(lm)
        run(lm, PROMPTS[2])
    assert manager.texts[-1]["resid_post.2"].shape[1] == ids_of(lm, PROMPTS[2]).shape[1]


# ---- what it sees


def test_foreign_code_is_read_at_its_own_positions_with_either_padding(lm):
    rows = [lm.tokenizer.encode(text) for text in PROMPTS]
    width = max(map(len, rows))
    expected = hk.forward(lm, PROMPTS, hk.capture(SITE), hk.steer(SITE, VECTOR, pos=-1)).logits
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for n, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[n, place], mask[n, place] = torch.tensor(row), 1
        with (
            torch.no_grad(),
            hk.attach(lm, hk.capture(SITE, name="x"), hk.steer(SITE, VECTOR, pos=-1)) as manager,
        ):
            out = lm.model(
                ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            ).logits
        for n, row in enumerate(rows):
            mine = out[n][mask[n].bool()]
            assert torch.allclose(mine, expected[n, : len(row)], atol=1e-4)
            assert manager.captured(SITE).positions[n, : len(row)].tolist() == list(range(len(row)))


def test_a_mask_with_holes_is_counted_without_them(lm):
    ids, mask = ids_of(lm), torch.ones_like(ids_of(lm))
    mask[0, 2] = 0
    with torch.no_grad(), hk.attach(lm, hk.capture(SITE, pos=[1, 2])) as manager:
        lm.model(ids, attention_mask=mask)
    with torch.no_grad(), hk.attach(lm, hk.capture(SITE)) as everything:
        lm.model(ids, attention_mask=torch.ones_like(mask), position_ids=None)
    del everything
    assert manager[SITE].shape == (1, 2, 32)
    assert manager.captured(SITE).positions.tolist() == [[1, 2]]


def test_a_decoding_loop_of_the_users_own_is_one_text(lm):
    ids = ids_of(lm)
    length = ids.shape[1]
    hooks = [
        hk.capture(SITE),
        hk.steer("resid_post.0", VECTOR, pos=hk.GENERATED),
        hk.force(7, step=1),
    ]
    with torch.no_grad(), hk.attach(lm, *hooks) as manager:
        out = lm.model(ids, use_cache=True)
        chosen = []
        for _ in range(3):
            chosen.append(out.logits[:, -1:].argmax(-1))
            out = lm.model(chosen[-1], past_key_values=out.past_key_values, use_cache=True)
    expected = hk.generate(lm, ids, *hooks, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.cat(chosen, 1).tolist() == expected.tokens[:, length : length + 3].tolist()
    assert manager.captured(SITE).positions.tolist() == [list(range(length + 3))]
    assert torch.allclose(manager[SITE], expected[SITE], atol=1e-4)


def test_foreign_generate_is_one_text_with_absolute_positions(lm):
    ids = ids_of(lm)
    hooks = [hk.capture(SITE), hk.steer(SITE, VECTOR, pos=-1), hk.ban(5)]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with hk.attach(lm, *hooks) as manager:
        tokens = lm.model.generate(ids, **settings)
    expected = hk.generate(lm, ids, *hooks, **settings)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(manager[SITE], expected[SITE])
    assert "generate" not in lm.root.__dict__


def test_foreign_generate_without_a_mask_counts_the_padding_that_transformers_infers(lm):
    row = lm.tokenizer.encode(PROMPTS[0])
    ids = torch.tensor([[319, 319, *row]])
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 1, "pad_token_id": 319}
    with hk.attach(lm, hk.capture(SITE, pos=0)) as manager:
        lm.model.generate(ids, **settings)
    assert torch.allclose(
        manager[SITE], hk.forward(lm, [row], hk.capture(SITE, pos=0))[SITE], atol=1e-5
    )


def test_several_texts_in_a_block_are_kept_apart(lm):
    with hk.attach(lm, hk.capture(SITE)) as manager:
        for text in PROMPTS:
            run(lm, text)
    assert [kept[SITE].shape[1] for kept in manager.texts] == [
        ids_of(lm, text).shape[1] for text in PROMPTS
    ]
    with pytest.raises(
        NotCaptured, match=r"3 texts ran in this block, and one is meant: ask manager.texts\[0\]"
    ):
        manager[SITE]


def test_what_ran_can_be_read_inside_the_block(lm):
    with hk.attach(lm, hk.capture(SITE)) as manager:
        with pytest.raises(NotCaptured, match="no forward of the model has run"):
            manager[SITE]
        run(lm)
        assert torch.equal(manager[SITE], hk.forward(lm, PROMPTS[0], hk.capture(SITE))[SITE])


def test_the_body_without_its_head_can_be_run(lm):
    body = lm.model.get_decoder()
    with torch.no_grad(), hk.attach(lm, hk.capture(SITE, pos=-1)) as manager:
        body(ids_of(lm))
    assert torch.equal(manager[SITE], hk.forward(lm, PROMPTS[0], hk.capture(SITE, pos=-1))[SITE])


def test_a_block_called_by_itself_is_refused(llama):
    with (
        pytest.raises(Unsupported, match="'model.norm' was called by itself, outside a forward"),
        hk.attach(llama, hk.scale("final_norm", 2.0)),
    ):
        llama.model.model.norm(torch.ones(1, 2, 32))


def test_position_embeddings_that_serve_every_row_can_be_edited_in_one(gpt2):
    ids = ids_of(gpt2).repeat(2, 1)
    with (
        torch.no_grad(),
        hk.attach(gpt2, hk.ablate("pos_embed", rows=1), hk.capture("pos_embed")) as manager,
    ):
        out = gpt2.model(ids).logits
    assert manager["pos_embed"].shape[0] == 2
    assert (manager["pos_embed"][1] == 0).all()
    plain = run(gpt2).logits
    assert torch.allclose(out[0], plain[0], atol=1e-5)
    assert not torch.allclose(out[1], plain[0], atol=1e-2)


def test_the_log_says_which_hook_fired_where_and_what_it_changed(lm):
    hooks = [
        hk.capture("embed", pos=0),
        hk.steer(SITE, torch.eye(32)[3], pos=[1, 2], rows=2),
        hk.ban(3, 4),
    ]
    log = hk.forward(lm, PROMPTS, *hooks).log
    assert list(log.columns) == [
        "hook",
        "do",
        "site",
        "forward",
        "row",
        "positions",
        "numbers",
        "changed",
        "held",
        "reason",
    ]
    steered = log[log["hook"] == 1]
    assert steered[["site", "row", "positions", "numbers", "changed"]].values.tolist() == [
        [SITE, 2, "1-2", 64, 2]
    ]
    assert log[log["hook"] == 0][["row", "positions", "changed"]].values.tolist() == [
        [0, "0", 0],
        [1, "0", 0],
        [2, "0", 0],
    ]
    banned = log[log["hook"] == 2]
    lengths = [len(lm.tokenizer.encode(text)) for text in PROMPTS]
    assert banned[["positions", "changed"]].values.tolist() == [
        [str(length - 1), 2] for length in lengths
    ]


def test_the_log_of_a_generate_leaves_out_what_a_finished_row_was_fed(lm):
    run_ = hk.generate(
        lm,
        PROMPTS[:2],
        hk.force(1, step=1, rows=0),
        hk.scale(SITE, 1.5),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=1,
    )
    log = run_.log[run_.log["site"] == SITE]
    last = {
        row: max(int(p.split("-")[-1]) for p in rows["positions"])
        for row, rows in log.groupby("row")
    }
    assert last == {row: length - 2 for row, length in enumerate(run_.lengths)}
    assert run_.lengths[0] == run_.prompt_lengths[0] + 2


# ---- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_captures_and_edits_work_in_every_gradient_mode(lm, mode):
    ids = ids_of(lm)
    with (
        mode(),
        hk.attach(
            lm, hk.capture(lm.sites()), hk.steer(SITE, VECTOR), hk.steer("resid_mid.1", VECTOR)
        ) as manager,
    ):
        out = lm.model(ids).logits
    expected = hk.forward(lm, ids, hk.steer(SITE, VECTOR), hk.steer("resid_mid.1", VECTOR)).logits
    assert torch.allclose(out, expected, atol=1e-5)
    kept = manager[SITE]
    assert not kept.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (kept * weight).sum().backward()  # inference tensors could not
    assert weight.grad is not None


@pytest.mark.parametrize("pos", [None, -1, [0, 2]])
def test_gradients_at_a_captured_site_are_those_of_autograd_by_hand(lm, pos):
    ids = ids_of(lm)
    for site in [SITE, "z.1", "resid_mid.1", "embed", "mlp_post.2", "q.1.0"]:
        run_ = hk.forward(lm, ids, hk.capture(site, pos=pos, grad=True))
        (found,) = torch.autograd.grad(run_.logits[0, -1, 7], run_[site])
        assert torch.equal(run_.logits.detach(), hk.forward(lm, ids).logits)
        step = torch.randn_like(found) * 1e-3
        up, down = (
            hk.forward(lm, ids, hk.steer(site, sign * step, pos=pos)).logits[0, -1, 7]
            for sign in (1, -1)
        )
        assert float((up - down) / 2) == pytest.approx(
            float((found * step).sum()), rel=0.02, abs=2e-6
        )


def test_gradients_work_where_all_weights_are_frozen(small_tokenizer):
    lm = hk.LM(tiny("llama").requires_grad_(False), small_tokenizer)
    run_ = hk.forward(lm, PROMPTS[0], hk.capture(SITE, grad=True))
    run_.logits[0, -1, 3].backward()
    assert float(run_[SITE].grad.abs().max()) > 0


def test_a_capture_with_gradients_is_refused_where_there_are_none(llama):
    with pytest.raises(Unsupported, match="needs gradients, which are off here"):
        hk.generate(llama, PROMPTS[0], hk.capture(SITE, grad=True), max_new_tokens=2)


def test_captures_are_kept_in_the_dtype_and_device_that_was_asked(llama):
    run_ = hk.forward(llama, PROMPTS, hk.capture([SITE, "z.1"], dtype=torch.float16, device="cpu"))
    assert run_[SITE].dtype == torch.float16
    assert torch.allclose(
        run_[SITE].float(), hk.forward(llama, PROMPTS, hk.capture(SITE))[SITE], rtol=1e-3, atol=1e-2
    )


def test_a_capture_keeps_only_the_storage_of_what_was_asked(lm):
    run_ = hk.forward(
        lm, PROMPTS, hk.capture([SITE, "z.1.2", "q.0"], pos=-1), hk.capture("resid_post.0", rows=1)
    )
    for site in run_.sites:
        assert run_[site].untyped_storage().nbytes() == run_[site].numel() * 4


def test_a_compiled_model_runs_as_it_is_written_so_that_no_edit_is_lost(small_tokenizer):
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        compiled(ids)
    expected = hk.forward(hk.LM(model, small_tokenizer), ids, hk.ablate("mlp_out.1")).logits
    plain = hk.forward(hk.LM(model, small_tokenizer), ids).logits
    for held in (compiled, model):
        lm = hk.LM(held, small_tokenizer)
        assert torch.equal(hk.forward(lm, ids, hk.ablate("mlp_out.1")).logits, expected)
        with torch.no_grad(), hk.attach(lm, hk.ablate("mlp_out.1")):
            assert torch.equal(compiled(ids).logits, expected)
        forced = hk.generate(lm, ids, hk.force(9), max_new_tokens=3, cache_implementation="static")
        assert forced.tokens[0, 3:].tolist() == [9, 9, 9]
    with torch.no_grad():
        assert torch.allclose(compiled(ids).logits, plain, atol=1e-5)
    model.model.layers[1].compile(backend="eager")
    with torch.no_grad():
        model(ids)
    assert torch.equal(
        hk.forward(hk.LM(model, small_tokenizer), ids, hk.ablate("mlp_out.1")).logits, expected
    )


def test_two_threads_in_one_block_are_refused(lm):
    ready, go, errors = threading.Event(), threading.Event(), []

    def edit(x):
        if threading.current_thread() is not threading.main_thread():
            return x
        ready.set()
        go.wait(20)
        return x

    def other():
        ready.wait(20)
        try:
            run(lm)
        except Unsupported as error:
            errors.append(str(error))
        go.set()

    with hk.attach(lm, hk.edit(SITE, edit)):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(other,))
        thread.start()
        run(lm)
        thread.join()
    assert errors == [
        "two threads run the model inside one block: give each a block, or take turns"
    ]


def test_a_generate_in_another_thread_is_hooked_in_the_blocks_context_and_else_refused(lm):
    """As with transformers' TextIteratorStreamer."""
    out = []
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}

    def write():
        try:
            out.append(lm.model.generate(ids_of(lm), **settings)[0, -3:].tolist())
        except Unsupported as error:
            out.append(str(error))

    with hk.attach(lm, hk.force(9)):
        for target, args in ((contextvars.copy_context().run, (write,)), (write, ())):
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
    assert out[0] == [9, 9, 9]
    assert "a block of hk.attach is open on this model in another thread or task" in out[1]


# ---- a plain nn.Module


class Teaching(nn.Module):
    """nn.Embedding, a transformer layer, and a Linear that makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x)))


def test_the_teaching_model_is_captured_edited_and_forced():
    model = Teaching().eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        plain = model(ids)
    head = hk.module("head")
    hooks = [
        hk.capture(hk.module("encoder")),
        hk.capture(head, name="before"),
        hk.force(7, site=head),
        hk.ban(9, site=head, rows=1),
        hk.capture(head, name="after"),
    ]
    with torch.no_grad(), hk.attach(model, *hooks) as manager:
        out = model(ids)
    assert torch.equal(manager["head:output", "before"], plain)
    assert torch.equal(manager["head:output", "after"], out)
    assert torch.equal(out[:, -1, 7], plain[:, -1].amax(-1) + 10)
    assert out[1, -1, 9] == -torch.inf
    assert torch.equal(out[:, :-1], plain[:, :-1])
    assert manager["encoder:output"].shape == (2, 3, 16)
    with torch.no_grad():
        assert torch.equal(model(ids), plain)


def test_the_teaching_model_runs_through_forward_and_gives_tables():
    lm = hk.LM(Teaching().eval())
    run_ = hk.forward(lm, [[1, 2, 3]], hk.force(7, site=hk.module("head")))
    table = hk.ranks(run_, top=3)
    assert table["token_id"].iloc[0] == 7
    assert table["token"].iloc[0] == "<7>"
    with pytest.raises(MissingSite, match="the model has no unembedding head"):
        hk.forward(lm, [[1, 2, 3]], hk.force(7))


def test_inputs_and_outputs_of_any_module_can_be_taken_by_index_or_keyword(llama):
    attention = "model.layers.1.self_attn"
    hooks = [
        hk.capture(hk.module(attention, side="input", item="hidden_states")),
        hk.capture(hk.module("model.rotary_emb", item=1)),
        hk.edit(hk.module("model.layers.1.mlp.act_fn"), torch.zeros_like),
    ]
    with torch.no_grad(), hk.attach(llama, *hooks) as manager:
        out = llama.model(ids_of(llama)).logits
    expected = hk.forward(llama, ids_of(llama), hk.ablate("mlp_out.1"), hk.capture("attn_in.1"))
    assert torch.allclose(out, expected.logits, atol=1e-5)
    assert torch.equal(manager[f"{attention}:input:hidden_states"], expected["attn_in.1"])
    assert manager["model.rotary_emb:output:1"].shape[-1] == 8


def test_a_tuples_other_parts_are_left_as_they_are():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            a, b = self.inner(x)
            return a + b

    class Inner(nn.Module):
        def forward(self, x):
            return x, 10 * x

    x = torch.ones(2, 3, 4)
    with hk.attach(Pair(), hk.scale(hk.module("inner", item=0), 0.0)) as manager:
        assert torch.equal(manager.lm.model(x), 10 * x)


@pytest.mark.parametrize(
    ("hook", "error", "words"),
    [
        (
            hk.capture(hk.module("nope")),
            UnknownSite,
            "the model has no module 'nope'. Its first modules are: model, lm_head",
        ),
        (
            hk.capture(hk.module("model.layers.1.self_attn", item=1)),
            BadEdit,
            "gives a tuple of 2, and item 1 of it is no tensor",
        ),
        (
            hk.capture(hk.module("model.layers.1.self_attn", side="input", item=3)),
            BadEdit,
            "is no tensor among them: say which",
        ),
        (
            hk.capture(hk.module("model.rotary_emb"), pos=-1, rows=1),
            OutOfRange,
            "row 1 was asked for, and the batch has 1 row",
        ),
    ],
    ids=str,
)
def test_a_module_that_is_not_as_asked_is_refused(llama, hook, error, words):
    with pytest.raises(error, match=words), hk.attach(llama, hook):
        run(llama)


def test_a_tensor_without_batch_and_pos_is_taken_whole_or_not_at_all():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.pool(x.transpose(1, 2))[..., 0])

    model, x = Pooled(), torch.ones(2, 3, 4)
    with (
        torch.no_grad(),
        hk.attach(
            model, hk.capture(hk.module("head")), hk.scale(hk.module("head"), 2.0)
        ) as manager,
    ):
        out = model(x)
    assert torch.equal(out, manager["head:output"] * 2)
    for hook, words in (
        (hk.capture(hk.module("head"), pos=0), "without axes batch and pos"),
        (hk.force(1, site=hk.module("head")), "without axes batch and pos"),
    ):
        with torch.no_grad(), pytest.raises(BadHook, match=words), hk.attach(model, hook):
            model(x)


# ---- wishes that take no effect


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda x: None, "returned None: end it with `return`"),
        (
            lambda x: x[:, :1],
            r"was given shape \[1, \d+, 32\] and returned \[1, 1, 32\]: return the same shape",
        ),
        (lambda x: x.double(), "was given torch.float32 and returned torch.float64"),
        (
            lambda x: x / 0 * 0,
            r"returned \d+ numbers at resid_post.1 that are infinite or NaN, where there was none",
        ),
        (lambda x: "x", "returned a str: return a tensor"),
    ],
    ids=["None", "shape", "dtype", "NaN", "kind"],
)
def test_an_edit_that_gives_back_what_cannot_be_used_is_refused(lm, edit, words):
    with pytest.raises(BadEdit, match=words):
        hk.forward(lm, PROMPTS[0], hk.edit(SITE, edit))
    assert torch.equal(
        hk.forward(lm, PROMPTS[0]).logits, by_hand.logits(lm.model, ids_of(lm)[0].tolist())
    )


def test_padding_does_not_count_as_nan(lm):
    normed = hk.edit(SITE, lambda x: x / x.norm(dim=-1, keepdim=True))
    assert torch.isfinite(hk.forward(lm, PROMPTS, normed).logits).all()


def test_an_edit_in_place_reaches_the_model_and_nobody_elses_tensor(lm):
    def edit(x):
        x[:, -1] = 0
        return x

    run_ = hk.forward(
        lm, PROMPTS[0], hk.capture(SITE, name="a"), hk.edit(SITE, edit), hk.capture(SITE, name="b")
    )
    assert float(run_[SITE, "a"][0, -1].abs().max()) > 0
    assert float(run_[SITE, "b"][0, -1].abs().max()) == 0


def test_an_edit_is_told_where_it_is(lm):
    told = []

    def edit(x, here):
        told.append((str(here.site), here.rows, here.positions.tolist(), here.valid, x.shape))
        return x

    hk.forward(lm, PROMPTS, hk.edit(SITE, edit, pos=[0, -1], rows=[0, 2]))
    lengths = [len(lm.tokenizer.encode(text)) for text in PROMPTS]
    assert told == [(SITE, [0, 2], [[0, lengths[0] - 1], [0, lengths[2] - 1]], None, (2, 2, 32))]
    steps = []
    hk.generate(
        lm,
        PROMPTS[0],
        hk.edit("logits", lambda x, here: steps.append(here.steps.tolist()) or x),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
    )
    assert steps == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize(
    ("hook", "error", "words"),
    [
        (
            hk.capture(SITE, pos=99),
            OutOfRange,
            r"capture\(resid_post.1, pos=99\) means position 99 of row 0, which has \d+ tokens",
        ),
        (hk.capture(SITE, pos=-99), OutOfRange, "position -99 was asked for, and the prompt has"),
        (
            hk.capture(SITE, rows=3),
            OutOfRange,
            "row 3 was asked for, and the batch has 3 rows, 0 to 2",
        ),
        (
            hk.force(3, step=1),
            OutOfRange,
            r"means step 1 of row 0, and a forward of the prompt has step 0 only: use generate",
        ),
        (
            hk.capture(SITE, pos=hk.GENERATED),
            EmptySelection,
            "selects nothing in row 0, which has positions 0 to",
        ),
        (hk.capture(SITE, pos=slice(8, None)), EmptySelection, "selects nothing in row 1"),
        (
            hk.capture(SITE, pos=hk.at("nowhere")),
            OutOfRange,
            r"at\('nowhere'\) was asked for, and 'I like oat milk in my' does not have it",
        ),
    ],
    ids=str,
)
def test_a_wish_that_the_prompts_cannot_meet_is_refused_before_the_forward(lm, hook, error, words):
    calls = []
    mine = layers(lm)[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=words):
        hk.forward(lm, PROMPTS, hook)
    mine.remove()
    assert not calls


def test_a_hook_that_never_fires_raises_on_leaving(lm):
    with (
        pytest.raises(
            NeverFired,
            match=r"capture\(resid_post.1\) never fired at resid_post.1: no forward of the model ran",
        ),
        hk.attach(lm, hk.capture(SITE)),
    ):
        pass
    with (
        pytest.raises(NeverFired, match="never fired at resid_post.1, though 1 forward ran"),
        hk.attach(lm, hk.capture(SITE, pos=hk.GENERATED)),
    ):
        run(lm)
    with (
        pytest.raises(
            NeverFired, match="means position 99 of row 0, and the text ended before it came there"
        ),
        hk.attach(lm, hk.capture(SITE, pos=[0, 99])),
    ):
        run(lm)


def test_a_module_that_is_never_called_is_a_hook_that_never_fires():
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight)

    with (
        pytest.raises(NeverFired, match="the model never calls this module"),
        hk.attach(Bypassed(), hk.scale(hk.module("linear"), 2.0)) as manager,
    ):
        manager.lm.model(torch.ones(1, 2, 4))


def test_a_loss_that_was_computed_before_the_edit_is_not_passed_on(lm):
    ids = ids_of(lm)
    with (
        pytest.raises(
            Unsupported, match="the model has computed its loss from the unedited logits"
        ),
        hk.attach(lm, hk.force(3)),
    ):
        run(lm, labels=ids)
    with hk.attach(lm, hk.steer(SITE, VECTOR)):
        loss = run(lm, labels=ids).loss
    logits = hk.forward(lm, ids, hk.steer(SITE, VECTOR)).logits
    assert float(loss) == pytest.approx(
        float(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])), abs=1e-5
    )


def test_a_mask_whose_positions_cannot_be_told_is_refused(llama):
    mask = torch.zeros(1, 1, 7, 7)
    with (
        pytest.raises(
            Unsupported,
            match=r"attention_mask is \[1, 1, 7, 7\]: positions are counted from a mask of shape",
        ),
        hk.attach(llama, hk.capture(SITE)),
    ):
        run(llama, attention_mask=mask)


def test_blocks_do_not_keep_models_alive():
    model = tiny("llama")
    lm = hk.LM(model)
    with hk.attach(lm, hk.capture(SITE)) as manager:
        model(torch.tensor([[1, 2]]))
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None


class Thrice(nn.Module):
    """A model whose one layer runs three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.pool, self.head = (
            nn.Embedding(50, 8), nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 50)
        )  # fmt: skip

    def forward(self, x):
        h = self.embed(x)
        for _ in range(3):
            h = h + torch.tanh(self.layer(h))
            self.pool(h.mean(dim=(0, 1)))
        return self.head(h)


@pytest.mark.parametrize(
    "make",
    [
        hk.capture,
        lambda site: hk.scale(site, 2.0),
        lambda site: hk.capture(site, pos=1),
        lambda site: hk.edit(site, abs),
    ],
)
@pytest.mark.parametrize(
    "place", [hk.module("layer"), hk.module("layer", side="input"), hk.module("pool")]
)
def test_a_module_that_runs_several_times_in_a_forward_is_refused(make, place):
    hook = make(place)
    if place.path == "pool" and hook.where.pos is not None:
        pytest.skip("it has no positions")
    model = Thrice()
    with (
        pytest.raises(Unsupported, match="ran twice or more in one forward"),
        hk.attach(model, hook),
    ):
        model(torch.tensor([[5, 9, 13]]))
    with hk.attach(model, hk.capture(hk.module("head"))) as manager:
        model(torch.tensor([[5, 9, 13]]))
        model(torch.tensor([[5, 9, 14]]))
    assert [len(text.all) for text in manager.texts] == [1, 1]


def test_a_module_that_runs_several_times_is_refused_in_every_kind_of_run():
    lm = hk.tiny("phi")
    site = hk.module("model.layers.0.resid_dropout")
    runs = [
        lambda hook: hk.forward(lm, [[5, 6, 7]], hook),
        lambda hook: hk.generate(lm, [[5, 6, 7]], hook, max_new_tokens=2, do_sample=False),
        lambda hook: hk.sweep(lm, [[5, 6, 7]], {"x": [1]}, lambda x: hook, hk.metrics.prob(3)),
    ]
    for run_ in runs:
        with pytest.raises(Unsupported, match="ran twice or more in one forward"):
            run_(hk.scale(site, 2.0))


@pytest.mark.parametrize("item", [9, 1, "hidden_states"])
@pytest.mark.parametrize("make", [hk.capture, lambda site: hk.scale(site, 0.0)])
def test_an_item_of_a_module_that_gives_one_tensor_is_refused(llama, item, make):
    hook = make(hk.module("model.layers.0.mlp", item=item))
    with pytest.raises(BadEdit, match=f"gives a Tensor, and item {item!r} of it is no tensor"):
        hk.forward(llama, [[5, 6, 7]], hook)


def test_a_model_output_is_edited_by_index_as_by_name():
    lm = hk.tiny("llama")
    ids = torch.tensor([[5, 6, 7]])
    for item in (0, "logits"):
        with torch.no_grad(), hk.attach(lm, hk.scale(hk.module("", item=item), 0.0)):
            output = lm.model(ids)
        assert (output.logits == 0).all()
        assert (output[0] == 0).all()
