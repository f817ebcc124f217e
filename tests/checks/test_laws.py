"""The laws of the design, for every family on tiny random models. Expected values come by hand (by_hand.py)."""

import by_hand
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.models.views import is_hidden

LAYERED = [
    "resid_pre",
    "attn_in",
    "q",
    "k",
    "v",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_pre",
    "mlp_post",
    "mlp_out",
    "resid_post",
]
WHOLE = ["embed", "pos_embed", "final_norm", "lm_head"]
EVERY = [*LAYERED, *WHOLE, "logits"]


def sites_of(lm: hk.LM, layer: int = 1) -> list[hk.Site]:
    names = [name for name in EVERY if name in lm.family.locations]
    return [hk.Site(name, layer if name in LAYERED else None) for name in names]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a fraction of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(
        1e-3, float(expected.abs().max())
    )


def same_text(site: hk.Site, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Values of one row [pos, ...] in a batch and alone; scores and patterns may have more keys there, all unseen."""
    if site.name in ("scores", "pattern"):
        found, expected = (
            x.transpose(0, 1) if x.ndim == 3 else x for x in (found, expected)
        )  # [query, head, key]
        found = found[: expected.shape[0]]
        keys = min(found.shape[-1], expected.shape[-1])
        unseen = torch.finfo(found.dtype).min if site.name == "scores" else 0.0
        assert (found[..., keys:] == unseen).all() and (expected[..., keys:] == unseen).all()
        seen = ~is_hidden(expected[..., :keys])
        assert torch.equal(seen, ~is_hidden(found[..., :keys]))
        found, expected = found[..., :keys].where(seen, 0), expected[..., :keys].where(seen, 0)
        close(found, expected, 3e-5)
        return
    close(found[: expected.shape[0]], expected)


def rows_of(lm: hk.LM) -> list[list[int]]:
    return [lm.tokenizer.encode(prompt) for prompt in PROMPTS]


def plain_batch(lm: hk.LM, side: str) -> dict[str, torch.Tensor]:
    """The prompts padded by hand."""
    rows = rows_of(lm)
    width = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_without_hooks_logits_are_those_of_plain_transformers(lm):
    for prompt, row in zip(PROMPTS, rows_of(lm), strict=True):
        assert torch.equal(hk.forward(lm, prompt).logits, by_hand.logits(lm.model, row))
    run = hk.forward(lm, PROMPTS)
    with torch.no_grad():
        batch = plain_batch(lm, "right")
        expected = lm.model(
            **batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        ).logits
    assert torch.equal(run.logits[run.mask], expected[run.mask])
    assert (run.logits[~run.mask] == 0).all()


def test_looking_changes_nothing(lm):
    everything = hk.capture(lm.sites())
    assert torch.equal(hk.forward(lm, PROMPTS, everything).logits, hk.forward(lm, PROMPTS).logits)
    plain = lm.model.generate(torch.tensor([rows_of(lm)[0]]), max_new_tokens=5, do_sample=False)
    looked = hk.generate(lm, PROMPTS[0], everything, max_new_tokens=5, do_sample=False)
    assert torch.equal(looked.tokens, plain[:, : looked.tokens.shape[1]])


def test_every_site_holds_what_a_hand_written_hook_finds(lm):
    run = hk.forward(lm, PROMPTS, hk.capture(lm.sites()))
    for row, ids in enumerate(rows_of(lm)):
        for site in lm.sites():
            name, layer = site.name, site.layer
            if name in ("scores", "pattern", "q_rot", "k_rot"):
                continue  # test_every_family.py
            expected = (
                by_hand.logits(lm.model, ids)
                if name == "logits"
                else by_hand.captured(lm.model, ids, name, layer)
            )
            close(run[site][row : row + 1, : len(ids)], expected.expand(1, *expected.shape[1:]))
            assert (run[site][row, len(ids) :] == 0).all()


def test_attention_and_mlp_sum_to_the_residual_stream(lm):
    run = hk.forward(lm, PROMPTS, hk.capture(lm.sites()))
    for layer in range(lm.n_layers):
        pre, mid, post = (run[f"resid_{when}.{layer}"] for when in ("pre", "mid", "post"))
        close(pre + run[f"attn_out.{layer}"], mid)
        close(mid + run[f"mlp_out.{layer}"], post)


def test_z_through_the_output_projection_is_what_attention_gives(lm):
    run = hk.forward(lm, PROMPTS[0], hk.capture(lm.sites("z")), hk.capture(lm.sites("attn_out")))
    for layer in range(lm.n_layers):
        z = run[f"z.{layer}"].flatten(2)
        attention = lm.submodule(lm.location(hk.Site("z", layer)).path)
        with torch.no_grad():
            close(attention(z), run[f"attn_out.{layer}"])


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS], ids=["one", "batch"])
def test_patching_a_run_with_itself_is_the_identity_bit_for_bit(lm, prompts):
    source = hk.forward(lm, prompts, hk.capture(lm.sites()))
    for site in sites_of(lm):
        assert torch.equal(hk.forward(lm, prompts, hk.patch(site, source)).logits, source.logits), (
            site
        )
    everything = hk.forward(lm, prompts, hk.patch(lm.sites(), source))
    assert torch.equal(everything.logits, source.logits)


def test_steering_there_and_back_gives_the_original(lm):
    original = hk.forward(lm, PROMPTS)
    for site in sites_of(lm):
        vector = torch.randn(lm.shape(site))
        back = hk.forward(
            lm, PROMPTS, hk.steer(site, vector, scale=2.0), hk.steer(site, vector, scale=-2.0)
        )
        close(back.logits, original.logits, 1e-4)
        assert not torch.equal(
            hk.forward(lm, PROMPTS, hk.steer(site, vector, scale=2.0)).logits, original.logits
        )


def test_zeroing_any_site_changes_the_output(lm):
    original = hk.forward(lm, PROMPTS).logits
    for site in [*lm.sites(), *lm.sites("z", heads=[0]), *lm.sites("v", heads=[1])]:
        changed = hk.forward(lm, PROMPTS, hk.ablate(site)).logits
        assert float((changed - original).abs().max()) > 1e-3, site


@pytest.mark.parametrize(
    "edit", [lambda x: x * 0, lambda x: x * 1.5 + 0.25], ids=["zero", "affine"]
)
def test_an_edit_does_what_a_hand_written_edit_does(lm, edit):
    ids = rows_of(lm)[0]
    for site in sites_of(lm):
        if site.name in ("q", "k", "v", "resid_mid", "logits", "embed", "pos_embed"):
            continue  # below: the hand-written hook needs its own slice, or both of its readers
        expected = by_hand.edited_logits(lm.model, ids, site.name, site.layer, edit)
        close(hk.forward(lm, PROMPTS[0], hk.edit(site, edit)).logits, expected)


def test_an_edit_of_q_k_and_v_reaches_its_own_part_of_a_fused_projection(gpt2):
    ids = rows_of(gpt2)[0]
    for part, name in enumerate("qkv"):

        def edit(x: torch.Tensor, part: int = part) -> torch.Tensor:
            x = x.clone()
            x[..., 32 * part : 32 * (part + 1)] += 0.5
            return x

        expected = by_hand.edited_logits(gpt2.model, ids, name, 1, edit)
        close(
            hk.forward(gpt2, PROMPTS[0], hk.edit(f"{name}.1", lambda x: x + 0.5)).logits, expected
        )


def test_an_edit_of_resid_mid_reaches_the_mlp_and_the_stream(lm):
    """By hand: the block's second half is computed from the edited stream, outside the model."""
    ids, layer = rows_of(lm)[0], 1
    block = (
        lm.model.model.layers[layer] if lm.family.name == "llama" else lm.model.transformer.h[layer]
    )
    norm = block.post_attention_layernorm if lm.family.name == "llama" else block.ln_2
    ramp = torch.linspace(-2, 2, 32)
    for edit in (lambda x: x * 0, lambda x: x + ramp):
        mid = edit(by_hand.captured(lm.model, ids, "resid_mid", layer))
        with torch.no_grad():
            after = mid + block.mlp(norm(mid))
        expected = by_hand.edited_logits(
            lm.model, ids, "resid_post", layer, lambda x, after=after: after
        )
        close(hk.forward(lm, PROMPTS[0], hk.edit(f"resid_mid.{layer}", edit)).logits, expected)
        half = by_hand.edited_logits(lm.model, ids, "resid_mid", layer, edit)
        assert float((half - expected).abs().max()) > 1e-2, "the trap would not be seen"


def test_ablating_all_heads_equals_ablating_the_attention(lm):
    bias = getattr(lm.submodule(lm.location(hk.Site("z", 1)).path), "bias", None)
    to = torch.zeros(32) if bias is None else bias.detach()
    every_head = [hk.ablate(lm.sites("z", layers=[1], heads=range(4)))]
    expected = hk.forward(lm, PROMPTS, hk.ablate("attn_out.1", to=to)).logits
    close(hk.forward(lm, PROMPTS, *every_head).logits, expected)
    close(hk.forward(lm, PROMPTS, hk.ablate("z.1")).logits, expected)


def test_a_skipped_block_leaves_the_stream_as_it_was(lm):
    run = hk.forward(lm, PROMPTS, hk.skip_block(1), hk.capture(["resid_pre.1", "resid_pre.2"]))
    assert torch.equal(run["resid_pre.1"], run["resid_pre.2"])
    ids = rows_of(lm)[0]
    before = by_hand.captured(lm.model, ids, "resid_pre", 1)
    expected = by_hand.edited_logits(lm.model, ids, "resid_post", 1, lambda x: before)
    close(hk.forward(lm, PROMPTS[0], hk.skip_block(1)).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pos", [None, -1, 0, slice(0, 1), slice(-2, None)], ids=str)
def test_one_row_alone_is_the_row_in_a_padded_batch_at_every_site(lm, side, pos):
    batch = plain_batch(lm, side)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    hooks = [hk.steer("resid_post.0", vector, pos=pos), hk.capture(lm.sites(), pos=pos)]
    together = hk.forward(lm, batch, *hooks)
    for row, prompt in enumerate(PROMPTS):
        alone = hk.forward(lm, prompt, *hooks)
        length = alone.lengths[0]
        close(together.logits[row, :length], alone.logits[0], 1e-5)
        for site in lm.sites():
            same_text(site, together[site][row], alone[site][0])
            width = alone.captured(site).positions.shape[1]
            assert torch.equal(
                together.captured(site).positions[row, :width], alone.captured(site).positions[0]
            )


@pytest.mark.parametrize(
    "way",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}],
    ids=["cache", "no cache", "chunks", "static cache"],
)
def test_every_way_of_decoding_gives_what_a_loop_by_hand_gives(lm, way):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    where = [
        {"pos": 2},
        {"pos": hk.GENERATED},
        {"pos": hk.PROMPT},
        {"pos": slice(4, 7)},
        {},
    ]
    ids = rows_of(lm)[0]
    start = len(ids)
    chosen = [
        lambda p: p == 2,
        lambda p: p >= start,
        lambda p: p < start,
        lambda p: 4 <= p < 7,
        lambda p: True,
    ]
    module, side, _ = by_hand.module_of(lm.model, "resid_post", 1)
    for at, wanted in zip(where, chosen, strict=True):

        def edit(x: torch.Tensor, wanted=wanted) -> torch.Tensor:
            here = torch.tensor([wanted(p) for p in range(x.shape[1])])
            return x + 3.0 * vector * here[:, None]

        def say(said: torch.Tensor, step: int) -> torch.Tensor:
            if step == 2:
                said[7] = said.max() + 10
            said[9] = -torch.inf
            return said

        handle = by_hand.with_hook(module, side, edit)
        expected = by_hand.greedy(lm.model, ids, 6, say)
        handle.remove()
        hooks = [hk.steer("resid_post.1", vector, scale=3.0, **at), hk.force(7, step=2), hk.ban(9)]
        run = hk.generate(
            lm,
            PROMPTS[0],
            *hooks,
            hk.capture("resid_post.1"),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            **way,
        )
        assert run.tokens[0].tolist() == expected
        again = (
            hk.forward(lm, [expected[:-1]], hooks[0], hk.capture("resid_post.1"))
            if at.get("pos") not in (hk.GENERATED, hk.PROMPT)
            else None
        )
        if again is not None:
            close(run["resid_post.1"], again["resid_post.1"])
            close(run.logits[0, 3:4, :9], again.logits[0, start + 2 : start + 3, :9], 1e-4)


@pytest.mark.parametrize(
    "way",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}],
    ids=["cache", "no cache", "chunks"],
)
def test_a_generated_row_alone_is_the_row_in_a_left_padded_batch(lm, way):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    hooks = [
        hk.steer("resid_mid.1", vector, pos=-1),
        hk.steer("z.2.1", vector[:8], scale=4.0, pos=hk.GENERATED),
        hk.boost(5, by=1.5),
        hk.capture(lm.sites()),
    ]
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": [1, 100, 150], **way}
    together = hk.generate(lm, PROMPTS, *hooks, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = hk.generate(lm, prompt, *hooks, **settings)
        length = alone.lengths[0]
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert together.lengths[row] == length
        steps = alone.logits.shape[1]
        close(together.logits[row, :steps], alone.logits[0], 1e-4)
        for site in lm.sites():
            same_text(site, together[site][row], alone[site][0])
            width = alone.captured(site).positions.shape[1]
            assert (together.captured(site).by_position[row, width:] == 0).all()


def test_a_forward_over_the_generated_text_gives_generates_logits(lm):
    run = hk.generate(lm, PROMPTS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row, start in enumerate(run.prompt_lengths):
        ids = run.tokens[row, : run.lengths[row]].tolist()
        expected = by_hand.logits(lm.model, ids)[0, start - 1 : -1]
        close(run.logits[row], expected, 1e-4)


def test_rows_with_different_hooks_in_one_batch_are_single_runs(lm):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    hooks = [
        lambda rows: hk.steer("resid_post.0", vector, scale=5.0, rows=rows, pos=-1),
        lambda rows: hk.ablate("z.1.2", rows=rows),
        lambda rows: hk.force(11, rows=rows),
    ]
    together = hk.forward(lm, PROMPTS, *(hook(row) for row, hook in enumerate(hooks)))
    written = hk.generate(
        lm,
        PROMPTS,
        *(hook(row) for row, hook in enumerate(hooks)),
        max_new_tokens=4,
        do_sample=False,
    )
    for row, (prompt, hook) in enumerate(zip(PROMPTS, hooks, strict=True)):
        alone = hk.forward(lm, prompt, hook(0))
        close(together.logits[row, : alone.lengths[0]], alone.logits[0], 1e-4)
        single = hk.generate(lm, prompt, hook(0), max_new_tokens=4, do_sample=False)
        assert written.tokens[row, : written.lengths[row]].tolist() == single.tokens[0].tolist()


def test_what_was_captured_is_unchanged_by_what_happens_later(lm):
    run = hk.forward(lm, PROMPTS, hk.capture(lm.sites()))
    copies = {site: run[site].clone() for site in lm.sites()}

    def spoil(_module, args, output):
        for tensor in [*args, *(output if isinstance(output, tuple) else [output])]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.zero_()

    layers = lm.model.model.layers if lm.family.name == "llama" else lm.model.transformer.h
    seen = []
    with hk.attach(lm, hk.capture(lm.sites())) as manager:
        handles = [layer.register_forward_hook(spoil) for layer in layers]
        with torch.no_grad():
            lm.model(**plain_batch(lm, "right"))
        seen = manager["resid_post.0"].clone()
        for handle in handles:
            handle.remove()
    assert float(seen.abs().max()) > 0, (
        "the capture came before the user's hook, and kept its own copy"
    )
    assert all(torch.equal(run[site], copies[site]) for site in lm.sites())


@pytest.mark.parametrize("ending", ["return", "exception", "interrupt"])
def test_no_hook_is_left_after_any_ending(lm, ending):
    mine = lm.model.lm_head.register_forward_hook(lambda *_: None)
    from conftest import hooks_on

    before = hooks_on(lm.root)

    def edit(x):
        if ending == "exception":
            raise ZeroDivisionError("mine")
        if ending == "interrupt":
            raise KeyboardInterrupt
        return x

    hooks = [hk.capture(lm.sites()), hk.edit("mlp_out.1", edit), hk.force(3)]
    try:
        for verb in (
            lambda: hk.forward(lm, PROMPTS, *hooks),
            lambda: hk.generate(lm, PROMPTS, *hooks, max_new_tokens=3),
        ):
            if ending == "return":
                verb()
            else:
                with pytest.raises(
                    ZeroDivisionError if ending == "exception" else KeyboardInterrupt
                ):
                    verb()
            assert hooks_on(lm.root) == before
    finally:
        mine.remove()
    row = rows_of(lm)[0]
    assert torch.equal(hk.forward(lm, PROMPTS[0]).logits, by_hand.logits(lm.model, row))
