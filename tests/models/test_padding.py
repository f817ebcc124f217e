"""A row of a padded batch has the numbers of the row alone, in models that count positions in different ways."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import hookkit as hk
from hookkit.errors import BadPrompt, HookkitError, Unsupported

ROWS = [[5, 9, 13, 17, 21, 30, 31, 44], [40, 41, 42]]
SIZES = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
}
DECODER = {
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
OFFSET = ("roberta", "xlm-roberta", "camembert", "data2vec-text")
NO_POSITIONS = ("bart", "marian", "mbart", "pegasus", "blenderbot", "bloom", "mpt")
STATES = ("lfm2", "qwen3_next", "mamba", "mamba2")


def made(name: str) -> hk.LM:
    words = DECODER | (SIZES if name in NO_POSITIONS[:5] else {})
    return hk.tiny(name, config=words if name in (*OFFSET, *NO_POSITIONS[:5]) else None)


def alone(model: nn.Module, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("name", [*OFFSET, *NO_POSITIONS, "opt", "gpt2"])
def test_a_padded_row_has_the_logits_of_the_row_alone_on_either_side(name):
    lm = made(name)
    everywhere, last = hk.forward(lm, ROWS).logits, hk.forward(lm, ROWS, logits="last").logits
    for number, row in enumerate(ROWS):
        expected = alone(lm.model, row)
        assert torch.allclose(everywhere[number, : len(row)], expected, atol=1e-4)
        assert torch.allclose(last[number, 0], expected[-1], atol=1e-4)


@pytest.mark.parametrize("name", [*NO_POSITIONS, "opt"])
def test_generation_after_padding_is_that_of_the_row_alone_or_is_refused(name):
    lm = made(name)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    if name in NO_POSITIONS[:5]:
        with pytest.raises(
            Unsupported, match="padded on the left has other numbers than the row alone"
        ):
            hk.generate(lm, ROWS, **settings)
    else:
        together = hk.generate(lm, ROWS, **settings).logits
        for number, row in enumerate(ROWS):
            assert torch.allclose(
                together[number], hk.generate(lm, [row], **settings).logits[0], atol=1e-4
            )
    same_length = hk.generate(lm, [ROWS[1], ROWS[1][::-1]], **settings).logits
    assert torch.allclose(same_length[0, 0], alone(lm.model, ROWS[1])[-1], atol=1e-4)


@pytest.mark.parametrize("name", [*STATES, "llama", "mpt", "bart"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_prompt_that_is_read_in_chunks_has_the_logits_of_the_row_alone_or_is_refused(name, chunk):
    lm = made(name)
    settings = {
        "max_new_tokens": 1,
        "do_sample": False,
        "eos_token_id": None,
        "prefill_chunk_size": chunk,
    }
    for rows in (ROWS, ROWS[:1]):
        try:
            logits = hk.generate(lm, rows, **settings).logits
        except Unsupported:
            assert name != "llama"
            continue
        for number, row in enumerate(rows):
            assert torch.allclose(logits[number, 0], alone(lm.model, row)[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_states_that_forget_the_mask_for_single_tokens_are_refused(name):
    with pytest.raises(
        Unsupported, match="prefill_chunk_size gives other logits than the prompt read at once"
    ):
        hk.generate(made(name), ROWS, max_new_tokens=1, do_sample=False, prefill_chunk_size=1)


def test_a_kind_of_cache_with_which_transformers_says_something_else_is_refused():
    static = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": "static",
    }
    with pytest.raises(Unsupported, match="cache_implementation='static' gives other logits"):
        hk.generate(made("gpt_neo"), [ROWS[0]], **static)
    lm = made("llama")
    run = hk.generate(lm, ROWS, **static)
    for number, row in enumerate(ROWS):
        text = run.tokens[number, : run.lengths[number] - 1].tolist()
        assert torch.allclose(run.logits[number], alone(lm.model, text)[len(row) - 1 :], atol=1e-4)


class Own(nn.Module):
    """A language model of one's own: learned positions, no cache, no return_dict."""

    class Config:
        model_type = "own"
        pad_token_id = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = self.Config()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(32, 16)
        self.layer, self.head = (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0),
            nn.Linear(16, 50),
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def compute(self, ids: torch.Tensor) -> torch.Tensor:
        width = ids.shape[1]
        hidden = self.words(ids) + self.places(torch.arange(width))
        ahead = torch.full((width, width), float("-inf")).triu(1)
        return self.head(self.layer(hidden, src_mask=ahead))


class OwnForCausalLM(Own):
    gives = "output"

    def forward(self, input_ids, attention_mask=None):
        logits = self.compute(input_ids)
        kinds = {"output": CausalLMOutput(logits=logits), "tuple": (logits, None), "tensor": logits}
        return kinds[self.gives]


class WithoutMaskForCausalLM(Own):
    def forward(self, input_ids):
        return self.compute(input_ids)


@pytest.mark.parametrize("gives", ["output", "tuple", "tensor"])
@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_model_of_ones_own_may_take_ids_and_a_mask_only(gives, logits):
    model = OwnForCausalLM().eval()
    model.gives = gives
    run = hk.forward(hk.LM(model), ROWS, hk.force(7, rows=0), logits=logits)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            expected = model.compute(torch.tensor([row]))[0, -1]
        said = run.logits[number, 0 if logits == "last" else len(row) - 1]
        if number == 0:
            assert int(said.argmax()) == 7
        else:
            assert torch.allclose(said, expected, atol=1e-5)


@pytest.mark.parametrize("gives", ["output", "tuple", "tensor"])
def test_a_model_of_ones_own_is_swept_cell_by_cell(gives):
    model = OwnForCausalLM().eval()
    model.gives = gives
    lm, site = hk.LM(model), hk.module("layer")
    table = hk.sweep(
        lm,
        [ROWS[0][:4]] * 2,
        {"factor": [1.0, 2.0]},
        lambda factor: hk.scale(site, factor),
        hk.metrics.prob(7),
    )
    for factor, rows in table.groupby("factor"):
        with torch.no_grad():
            handle = model.layer.register_forward_hook(
                lambda _m, _a, out, factor=factor: out * factor
            )
            expected = model.compute(torch.tensor([ROWS[0][:4]]))[0, -1].softmax(-1)[7]
            handle.remove()
        assert rows["prob"].tolist() == pytest.approx([float(expected)] * 2, abs=1e-5)


def test_a_model_without_a_mask_takes_prompts_of_one_length():
    lm = hk.LM(WithoutMaskForCausalLM().eval())
    assert hk.forward(lm, [[5, 6], [7, 8]]).logits.shape == (2, 2, 50)
    with pytest.raises(HookkitError, match="takes no attention_mask to hide padding"):
        hk.forward(lm, ROWS)


def test_rows_that_change_one_another_in_a_batch_are_refused_with_the_reason():
    class Mixed(OwnForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            logits = self.compute(input_ids)
            return CausalLMOutput(logits=logits + logits.mean(dim=(0, 1)))

    with pytest.raises(Unsupported, match="rows of one batch change one another"):
        hk.forward(hk.LM(Mixed().eval()), ROWS)


def test_a_trial_of_padding_is_seen_by_nobody_and_changes_nothing():
    lm = hk.tiny("llama")
    model, calls = lm.model, []
    model.train()
    model.model.layers[1].eval()
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    with hk.attach(lm, hk.capture("resid_post.0")) as outer:
        hk.forward(lm, ROWS, hk.capture("resid_post.1"), logits=False)
        hk.generate(lm, ROWS, max_new_tokens=1, do_sample=False)
    handle.remove()
    assert calls == [1, 1], "the user's hook saw forwards of a trial"
    assert len(outer.texts) == 2
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[1].training


def test_half_precision_and_dropout_do_not_pass_for_wrong_positions():
    lm = hk.tiny("llama")
    lm.model.bfloat16().train()
    assert hk.forward(lm, ROWS, logits="last").logits.shape == (2, 1, 320)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_a_wrapper_for_several_devices_says_where_the_model_is(wrapper):
    wrapped = wrapper.__new__(wrapper)
    nn.Module.__init__(wrapped)
    wrapped.module = hk.tiny("llama").model
    for call in (
        lambda: hk.forward(hk.LM(wrapped), [[5, 6]], hk.capture("resid_post.0")),
        lambda: hk.attach(wrapped, hk.capture(hk.module("lm_head"))),
    ):
        with pytest.raises(Unsupported, match=r"give hookkit the model itself, model\.module"):
            call()
    compiled = hk.LM(torch.compile(wrapped.module, backend="eager"))
    assert hk.forward(compiled, [[5, 6]], hk.capture("resid_post.0"))["resid_post.0"].shape == (
        1,
        2,
        32,
    )


def test_prompts_are_still_refused_where_a_module_takes_no_mask():
    with pytest.raises(BadPrompt, match="takes no mask"):
        hk.forward(hk.LM(nn.Sequential(nn.Embedding(50, 4))), ROWS, hk.capture(hk.module("0")))


def test_a_setting_that_is_none_is_taken_away_from_a_small_model():
    whole = hk.tiny("bart", config={"max_position_embeddings": None})
    assert whole.model.config.max_position_embeddings == 1024  # the default of transformers
    assert hk.tiny("llama", config={"num_key_value_heads": None}).shape("k.0") == (4, 8)
