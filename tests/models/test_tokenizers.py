# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
"""Texts and tokens with tokenizers of three kinds: a sentencepiece-like, a byte-level and a wordpiece-like one."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.ao.quantization import quantize_dynamic
from transformers import PreTrainedTokenizerFast

import hookkit as hk
from hookkit.errors import BadHook, NotOneToken, Unsupported

TEXT = "I like oat milk in my coffee shop and store . The answer is A or B : tea"
WORDS = TEXT.split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def corpus() -> list[str]:
    return [" ".join(WORDS)] * 50 + [word + end for word in WORDS for end in ("", ".")] * 5


def sentencepiece(prefix: str) -> PreTrainedTokenizerFast:
    """A space is "▁"; one is put before a text, by Metaspace ("first") or by a normalizer, as Llama's ("prepend")."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prefix == "prepend":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=[*SPECIAL, *BYTES]),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def wordpiece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        corpus(),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


KINDS = {
    "sentencepiece": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "llama": lambda: sentencepiece("prepend"),
    "byte-level": byte_level,
    "wordpiece": wordpiece,
}


def lm_with(tokenizer: PreTrainedTokenizerFast) -> hk.LM:
    size = max(tokenizer.get_vocab().values()) + 1
    return hk.tiny(
        "llama",
        tokenizer=tokenizer,
        config={"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2},
    )


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def lm(request: pytest.FixtureRequest) -> hk.LM:
    return lm_with(KINDS[request.param]())


@pytest.fixture(scope="module")
def spaced() -> hk.LM:
    return lm_with(sentencepiece("first"))


@pytest.mark.parametrize("prompt", ["I like oat milk in my", "tea", "The answer is A or B:"])
def test_a_prompt_and_what_was_generated_are_the_text(lm, prompt):
    for seed in range(4):
        run = hk.generate(
            lm, [prompt, "The store"], do_sample=True, top_k=0, seed=seed, max_new_tokens=6
        )
        for row in range(2):
            length, start = run.lengths[row], run.prompt_lengths[row]
            ids = run.tokens[row, :length].tolist()
            assert run.text[row] == lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            before = lm.text(ids[:start])
            assert before.rstrip("�") + run.generated[row] == run.text[row]


def test_every_token_that_has_a_text_of_its_own_is_read_back_by_it(lm):
    texts = [lm.string(token) for token in range(lm.n_tokens)]
    for token, text in enumerate(texts):
        if texts.count(text) == 1 and text.strip() and "�" not in text and token >= len(SPECIAL):
            try:
                assert lm.token(text) == token
            except (
                NotOneToken
            ) as error:  # a wordpiece in the middle of a word, or one that merges never leave
                assert repr(text) in str(error)


@pytest.mark.parametrize("prompt", ["The answer is A or B:", "I like oat", "tea."])
@pytest.mark.parametrize("after", ["\nA or B", " coffee", " milk in my coffee.", ".", " é", "A"])
def test_a_continuation_has_the_tokens_that_it_has_behind_the_prompt(spaced, prompt, after):
    tokenizer = spaced.tokenizer
    before, whole = tokenizer(prompt).input_ids, tokenizer(prompt + after).input_ids
    if whole[: len(before)] != before:
        pytest.skip("the prompt's last token becomes another")
    assert spaced.continuation(after) == whole[len(before) :]
    assert spaced.added(before, whole[len(before) :]) == after
    logits = spaced.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    right = -sum(logits[place - 1, whole[place]].item() for place in range(len(before), len(whole)))
    table = hk.sweep(
        spaced,
        [prompt],
        {"by": [1.0]},
        lambda by: hk.scale("embed", by),
        hk.metrics.loss(after),
        progress=False,
    )
    assert table["loss"].item() == pytest.approx(right / (len(whole) - len(before)), abs=1e-4)
    scored = hk.token_losses(spaced, [after], prefix=prompt)
    assert scored["loss"].sum() == pytest.approx(right, abs=1e-4)
    assert scored["token_id"].tolist() == whole[len(before) :]


@pytest.mark.parametrize("prompt", ["I like oat milk in my coffee", "é tea é or oat ☕ milk."])
def test_a_text_in_a_prompt_is_at_the_tokens_that_have_it(lm, prompt):
    text = lm.text(lm.tokenizer.encode(prompt))
    for word in dict.fromkeys(text.replace(".", " ").split()):
        if text.count(word) > 1 or "<" in word:
            continue
        run = hk.forward(lm, prompt, hk.capture("resid_post.0", pos=hk.at(word)))
        places = run.captured("resid_post.0").positions[0].tolist()
        ids = run.tokens[0].tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert word in lm.added(ids[: places[0]], ids[places[0] : places[-1] + 1])
        if not word.isascii():  # its last byte alone completes it
            continue
        inner = lm.added(ids[: places[0] + 1], ids[places[0] + 1 : places[-1] + 1])
        assert word not in inner and word not in lm.added(
            ids[: places[0]], ids[places[0] : places[-1]]
        )


def test_a_phrase_is_written_with_its_own_space(lm):
    for words in (" milk in my", " tea"):
        run = hk.generate(
            lm,
            "I like oat",
            hk.force(hk.word(words, exact=True)),
            max_new_tokens=8,
            do_sample=False,
        )
        assert run.generated[0].startswith(words)


def test_spellings_that_an_error_offers_are_taken(lm):
    for word in ("coffee", " coffee", "store", "oat", "Milk", " shop.", "coffee tea"):
        try:
            lm.token(word)
        except NotOneToken as error:
            offered = str(error).rsplit("One token each:", 1)[-1]
            for spelling in hk_strings(offered):
                assert isinstance(lm.token(spelling), int)


def hk_strings(text: str) -> list[str]:
    """The quoted texts of a message."""
    import ast
    import re

    return [ast.literal_eval(found) for found in re.findall(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", text)]


@pytest.mark.parametrize("after", [(8,), (8, 9, 10), [(8,), (9,)], [(8,), (9, 10, 11)]], ids=str)
def test_the_loss_of_a_continuation_of_any_length(after):
    lm, prompts = hk.tiny("llama"), [[5, 9, 13, 17, 21], [6, 7]]
    rows = after if isinstance(after, list) else [after, after]
    table = hk.sweep(
        lm,
        prompts,
        {"k": [1]},
        lambda k: hk.ablate(hk.Site("mlp_out", k)),
        hk.metrics.loss(after),
        progress=False,
    )
    handle = lm.model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: torch.zeros_like(output)
    )
    for number, (prompt, more) in enumerate(zip(prompts, rows, strict=True)):
        logits = lm.model(torch.tensor([[*prompt, *more]])).logits[0].log_softmax(-1)
        losses = [
            -logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(more)
        ]
        found = (
            table[table["row"] == number]["loss"].item() if "row" in table else table["loss"].item()
        )
        assert found == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    handle.remove()


def test_tensors_that_share_memory_are_saved_as_they_are(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "again": base,
        "part": base[1:3],
        "turned": base.T,
        "spread": torch.ones(1, 3).expand(4, 3),
        "small": base.to(torch.bfloat16)[:, ::2],
        "whole numbers": torch.arange(5),
        "none": torch.zeros(0, 3),
        "none either": torch.zeros(0),
        "with gradient": torch.ones(3, requires_grad=True),
    }
    path = hk.results.save_tensors(tensors, tmp_path / "t.safetensors")
    loaded = hk.results.load_tensors(path)
    assert list(loaded) == sorted(tensors) or set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()) and loaded[name].dtype == tensor.dtype
    for wrong in (base.to_sparse(), torch.empty(3, device="meta"), [1.0, 2.0]):
        with pytest.raises(BadHook, match="'wrong'"):
            hk.results.save_tensors({"wrong": wrong}, tmp_path / "wrong.safetensors")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
def test_a_layer_that_gives_no_gradient_is_named():
    model = quantize_dynamic(hk.tiny("llama").model, {torch.nn.Linear}, dtype=torch.qint8)
    lm, ids = hk.LM(model), [[5, 9, 13, 17]]
    run = hk.forward(lm, ids, hk.capture("resid_post.1"))
    assert torch.equal(run.logits, model(torch.tensor(ids)).logits)
    asks = {
        "direct_logits": lambda: hk.direct_logits(run, 7),
        "logit_terms": lambda: hk.logit_terms(run, 7),
        "unembedding": lambda: hk.unembedding(lm, 7),
        "capture": lambda: hk.forward(lm, ids, hk.capture("resid_post.0", grad=True)),
        "attribution": lambda: hk.attribution(
            lm, ids, [[5, 9, 13, 18]], "resid_post", hk.metrics.logit_diff(7, 8)
        ),
        "fit_vector": lambda: hk.fit_vector(
            lm, ids, hk.metrics.logprob(7), "resid_post.1", steps=1
        ),
    }
    for name, ask in asks.items():
        with pytest.raises(Unsupported, match="give no gradient, as quantised layers do"):
            ask()
            pytest.fail(name)
    assert hk.logit_lens(lm, ids, top=1)["rank"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_reads_images_names_its_tokens(spaced):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    size = spaced.n_tokens
    text = Gemma3TextConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=77,
    )  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    lm = hk.LM(Gemma3ForConditionalGeneration(config).eval(), spaced.tokenizer)
    assert (lm.sizes["vocab"], lm.n_tokens, lm.context) == (size, size, 77)
    table = hk.ranks(hk.forward(lm, "I like oat"), top=3)
    assert not table["token"].str.contains("unused").any()
    forced = hk.forward(lm, "I like oat", hk.force(" coffee")).logits[0, -1].argmax().item()
    assert lm.tokenizer.convert_ids_to_tokens(forced) == "▁coffee"
    with pytest.raises(hk.errors.BadPrompt, match=f"ids 0 to {size - 1}"):
        hk.forward(lm, [[size]])
