"""Chats with images: hk.chat(user=…, images=[…]) and hookkit --chat --image, read by the LM's processor."""

import json

import pytest
import torch
from images import llava_processor
from PIL import Image

import hookkit as hk
from hookkit.errors import BadPrompt, MissingSite, OutOfRange
from hookkit.models.chat import Chat
from hookkit.models.prompts import as_rows

TEXT = "w20 w21 w22"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def llava() -> hk.LM:
    return hk.LM(hk.tiny("llava").model, llava_processor())


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for name, colour in (("red", (220, 20, 10)), ("blue", (10, 30, 240))):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
        paths.append(str(folder / f"{name}.png"))
    return paths


def plain_inputs(llava, photos, **settings):
    """What transformers' processor gives for the same messages."""
    content = [{"type": "image", "path": path} for path in photos] + [
        {"type": "text", "text": TEXT}
    ]
    return llava.processor.apply_chat_template(
        [{"role": "system", "content": "w30"}, {"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_a_chat_with_images_is_what_the_processor_gives_for_its_messages(llava, photos, count):
    chat = hk.chat(system="w30", user=TEXT, images=photos[:count])
    inputs = plain_inputs(llava, photos[:count])
    with torch.no_grad():
        expected = llava.model(**inputs).logits
        text = llava.model.generate(**inputs, **GREEDY)
    run = hk.forward(llava, chat, hk.capture("resid_post.1", pos=hk.IMAGE))
    assert torch.equal(run.logits, expected)
    assert run["resid_post.1"].shape[1] == 4 * count
    assert hk.generate(llava, chat, **GREEDY).tokens.tolist() == text.tolist()


def test_an_image_of_pil_is_that_of_its_file_and_the_chat_is_json(llava, photos):
    from_file = hk.chat(user=TEXT, images=photos[:1])
    opened = hk.chat(user=TEXT, images=[Image.open(photos[0])])
    expected = hk.forward(llava, from_file).logits
    assert torch.equal(hk.forward(llava, opened).logits, expected)
    back = json.loads(opened.to_json())
    assert torch.equal(hk.forward(llava, Chat(**back)).logits, expected)
    other = hk.forward(llava, hk.chat(user=TEXT, images=photos[1:])).logits
    assert float((other - expected).abs().max()) > 1e-3


def test_two_chats_with_images_are_a_batch_and_a_patch_takes_one_as_its_source(llava, photos):
    chats = [hk.chat(user=TEXT, images=photos[:1]), hk.chat(user="w40", images=photos[1:])]
    together = hk.forward(llava, chats)
    for row, chat in enumerate(chats):
        alone = hk.forward(llava, chat).logits[0]
        assert float((together.logits[row, : len(alone)] - alone).abs().max()) < 1e-5
    source = hk.chat(user=TEXT, images=photos[1:])
    patched = hk.forward(llava, chats[0], hk.patch("resid_post.2", source)).logits
    assert float((patched - hk.forward(llava, source).logits).abs().max()) < 1e-5


def test_a_list_of_messages_has_its_images_in_parts(llava, photos):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": photos[0]}, {"type": "text", "text": TEXT}],
        },
        {"role": "assistant", "content": "w50"},
    ]
    (row,) = as_rows(llava, [messages])
    assert row.inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert llava.string(row[-1]) == "w50"


def test_images_that_would_be_ignored_are_refused(llava, photos, tmp_path):
    with pytest.raises(BadPrompt, match="is no file: give the path of an image"):
        hk.chat(user=TEXT, images=[str(tmp_path / "none.png")])
    with pytest.raises(BadPrompt, match="images= has 3"):
        hk.chat(user=TEXT, images=[3])
    with pytest.raises(BadPrompt, match="belong to the user's message"):
        hk.chat(system="w30", images=photos)
    chat = hk.chat(user=TEXT, images=photos[:1])
    bare = hk.LM(llava.model, llava.tokenizer)
    with pytest.raises(
        BadPrompt, match=r"this LM has no processor: make it with hk.LM\(model, processor\)"
    ):
        hk.forward(bare, chat)
    deaf = llava_processor()
    deaf.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(BadPrompt):
        hk.forward(hk.LM(llava.model, deaf), chat)
    with pytest.raises(MissingSite, match="lm_head"):
        hk.forward(llava, chat, hk.capture("pos_embed"))
    with pytest.raises(OutOfRange, match="or with an image, so it is not known"):
        hk.forward(llava, chat, hk.capture("resid_post.1", pos=hk.role("user")))


def test_the_command_line_reads_images(hookkit, llava, photos, tmp_path):
    llava.model.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    words = [
        "--model",
        str(tmp_path),
        "--chat",
        "--system",
        "w30",
        "--image",
        photos[0],
        "--image",
        photos[1],
    ]
    chat = hk.chat(system="w30", user=TEXT, images=photos)
    done = hookkit("generate", TEXT, *words, "--max-new-tokens", "3")
    assert done.exit_code == 0, done.stderr
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert done.stdout == f"{hk.generate(llava, chat, **settings).generated[0]}\n"
    done = hookkit("ranks", TEXT, *words, "--top", "3", "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    rows = printed if isinstance(printed, list) else printed["ranks"]
    expected = hk.ranks(hk.forward(llava, chat), top=3)["token_id"].tolist()
    assert [row["token_id"] for row in rows] == expected
    done = hookkit("generate", TEXT, "--image", photos[0])
    assert done.exit_code != 0 and "add --chat" in done.stderr
    done = hookkit("generate", TEXT, "--chat", "--image", "none.png")
    assert done.exit_code != 0 and "is no file" in done.stderr
