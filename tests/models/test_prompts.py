"""From what a user writes to a batch, and from a text to the positions of its tokens."""

import by_hand
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadPrompt, OutOfRange
from hookkit.models.named_positions import positions_of_text
from hookkit.models.positions import At
from hookkit.models.prompts import as_batch


def test_every_way_to_write_a_prompt_reads_the_same_tokens(llama):
    text = PROMPTS[0]
    ids = llama.tokenizer.encode(text)
    ways = [
        text, [text], ids, [ids], tuple(ids), torch.tensor(ids), torch.tensor([ids]), [torch.tensor(ids)],
        {"input_ids": [ids]}, {"input_ids": torch.tensor([[7, *ids]]), "attention_mask": torch.tensor([[0] + [1] * len(ids)])},
        llama.tokenizer(text, return_tensors="pt"),
    ]  # fmt: skip
    for way in ways:
        assert as_batch(llama, way).rows == (tuple(ids),), way
        assert torch.equal(hk.forward(llama, way).logits, by_hand.logits(llama.model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_token_and_counts_positions_without_it(llama, side):
    batch = as_batch(llama, PROMPTS, side=side)
    for row, ids in enumerate(batch.rows):
        assert tuple(batch.ids[row][batch.mask[row]].tolist()) == ids
        assert batch.positions[row][batch.mask[row]].tolist() == list(range(len(ids)))
    assert batch.padded
    own = (
        {"position_ids"} if side == "left" else set()
    )  # on the right the model's own positions are right
    assert set(batch.inputs(llama)) == {"input_ids", "attention_mask"} | own


def test_an_unpadded_batch_has_no_mask(llama):
    assert set(as_batch(llama, PROMPTS[0]).inputs(llama)) == {"input_ids"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt 0 is empty: the model needs at least one token"),
        (["Tea", ""], "prompt 1 is empty"),
        ([], "no prompt was given"),
        ([[]], "prompt 0 is empty"),
        ([[1, 320]], "prompt 0 has token id 320, and the vocabulary has ids 0 to 319"),
        ([[-1]], "prompt 0 has token id -1"),
        ([[1] * 129], "prompt 0 has 129 tokens, and the model's context is 128: shorten it"),
        (
            torch.zeros(1, 3),
            r"prompt 0 has 0.0 where a token id is meant: token ids are whole numbers",
        ),
        ([3.5], "is no prompt: give texts, chats, or rows of token ids"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]},
            r"row 0 has 2 input_ids, and its attention_mask has 3 numbers",
        ),
    ],
    ids=repr,
)
def test_a_prompt_that_cannot_be_read_is_refused(llama, prompt, words):
    with pytest.raises(BadPrompt, match=words):
        hk.forward(llama, prompt)


def test_a_prompt_that_leaves_no_room_for_the_new_tokens_is_refused(llama):
    with pytest.raises(
        BadPrompt, match="prompt 0 has 120 tokens and 20 new ones, and the model's context is 128"
    ):
        hk.generate(llama, [[1] * 120], max_new_tokens=20)


def test_text_without_a_tokenizer_is_refused(llama):
    with pytest.raises(
        BadPrompt, match="'Tea' is text, and this model came without a tokenizer: give token ids"
    ):
        hk.forward(hk.LM(llama.model), "Tea")


def covered(lm, text, at, which=None):
    ids = lm.tokenizer.encode(text)
    return [lm.string(ids[n]) for n in positions_of_text(lm, ids, At(at, which))]


def test_at_finds_the_tokens_that_cover_a_text(smol):
    text = "When Mary and John went to the store, John gave a drink to"
    assert covered(smol, text, "store") == [" store"]
    assert covered(smol, text, "Mary and") == [" Mary", " and"]
    assert covered(smol, text, "John", 0) == covered(smol, text, "John", -1) == [" John"]
    assert covered(smol, text, "he st") == [" the", " store"]
    ids = smol.tokenizer.encode(text)
    assert (
        positions_of_text(smol, ids, At("John", 1))[0]
        > positions_of_text(smol, ids, At("John", 0))[0]
    )


def test_at_finds_all_pieces_of_a_character_that_is_several_tokens(smol):
    ids = smol.tokenizer.encode("I drink 🧋 daily")
    places = positions_of_text(smol, ids, At("🧋"))
    assert len(places) > 1
    assert smol.tokenizer.decode([ids[n] for n in places]).strip() == "🧋"


def test_at_names_the_text_where_it_is_not_found_or_not_unique(smol):
    with pytest.raises(
        OutOfRange, match=r"at\('tea'\) was asked for, and 'I like oat milk' does not have it"
    ):
        covered(smol, "I like oat milk", "tea")
    with pytest.raises(
        OutOfRange,
        match=r"'a' occurs 2 times in 'a b a': say which, at\('a', which=0\) for the first",
    ):
        covered(smol, "a b a", "a")
    with pytest.raises(
        OutOfRange, match=r"at\('a', which=2\) was asked for, and it occurs 2 times"
    ):
        covered(smol, "a b a", "a", 2)
