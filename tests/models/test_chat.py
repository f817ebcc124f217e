"""Chats as prompts: the ids of the tokenizer's own template, and who said each token."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import tokenizer
from tokenizers.processors import TemplateProcessing

import hookkit as hk
from hookkit.errors import BadHook, BadPrompt, OutOfRange
from hookkit.models.chat import Chat
from hookkit.models.named_positions import find_positions
from hookkit.models.prompts import as_rows

TEMPLATES = {
    path.stem: path.read_text() for path in Path(__file__).with_name("chat_templates").iterdir()
}
WITHOUT_SYSTEM = ("gemma",)
WRITES_BOS = ("llama3", "llama2", "gemma", "mistral", "deepseek", "command_r")
DRINK, COFFEE, MORE = "  user: what do\nyou drink? ", "I drink coffee.", "Why? 何故"
QUESTION = {"role": "user", "content": DRINK}
ANSWER = {"role": "assistant", "content": COFFEE}
SYSTEM = {"role": "system", "content": "Say user."}
CONVERSATIONS = {
    "one question": [QUESTION],
    "three turns": [QUESTION, ANSWER, {"role": "user", "content": MORE}],
    "a system message": [SYSTEM, QUESTION],
    "a system message and three turns": [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": MORE}],
    "the beginning of an answer": [QUESTION, {"role": "assistant", "content": "I like"}],
}  # fmt: skip
CASES = [
    (family, name)
    for family in sorted(TEMPLATES)
    for name in CONVERSATIONS
    if family not in WITHOUT_SYSTEM or "system" not in name
]


def tokenizer_of(family):
    """A byte-level tokenizer that puts <s> before every text, with the template of a family."""
    made = tokenizer()
    bos = ("<s>", made.bos_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    made.chat_template = TEMPLATES[family]
    return made


@pytest.fixture(scope="module")
def lms():
    """A tiny model with the template of each family."""
    model = hk.tiny("llama", config={"max_position_embeddings": 1024, "vocab_size": 320}).model
    return {family: hk.LM(model, tokenizer_of(family)) for family in TEMPLATES}


def test_there_are_templates_of_ten_families():
    assert len(TEMPLATES) >= 10


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_ids_of_a_chat_are_those_of_the_template_with_one_bos(lms, family, name):
    lm, messages = lms[family], CONVERSATIONS[name]
    ending = {"add_generation_prompt": True}
    if messages[-1]["role"] == "assistant":
        ending = {"continue_final_message": True}
    expected = lm.tokenizer.apply_chat_template(messages, tokenize=True, **ending)["input_ids"]
    for prompt in (hk.chat(messages), messages, {"messages": messages}):
        (row,) = as_rows(lm, prompt)
        assert list(row) == expected
    first, second = as_rows(lm, [messages, [QUESTION]])
    assert list(first) == expected
    assert len(second) > 0
    n_questions = sum(message["role"] == "user" for message in messages)
    n_bos = {"llama2": n_questions}.get(family, 1) if family in WRITES_BOS else 0
    assert row.count(lm.tokenizer.bos_token_id) == n_bos


@pytest.mark.parametrize(("family", "name"), CASES)
def test_each_message_is_at_the_tokens_that_spell_it(lms, family, name):
    lm, messages = lms[family], CONVERSATIONS[name]
    (row,) = as_rows(lm, messages)
    taken = []
    for number, message in enumerate(messages):
        positions = find_positions(lm, row, hk.turn(number))
        text = lm.text([row[position] for position in positions])
        if family == "smollm3" and message["role"] == "assistant":
            # the template marks the whole turn of the assistant, which a prefilled one has not ended
            end = "<|im_end|>\n" if number < len(messages) - 1 else ""
            assert text == f"<|im_start|>assistant\n{message['content']}{end}"
        else:
            assert text.strip() == message["content"].strip()
        taken += positions
    template = find_positions(lm, row, hk.TEMPLATE)
    assert sorted([*taken, *template]) == list(range(len(row)))
    assert find_positions(lm, row, hk.turn(-1)) == find_positions(
        lm, row, hk.turn(len(messages) - 1)
    )
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    both = [position for n in users for position in find_positions(lm, row, hk.turn(n))]
    assert find_positions(lm, row, hk.role("user")) == tuple(both)
    last = find_positions(lm, row, hk.role("user", which=-1))
    assert last == find_positions(lm, row, hk.turn(users[-1]))


def test_roles_of_three_templates_counted_by_hand(smol, lms):
    (row,) = as_rows(smol, hk.chat(system="Be brief.", user="user tea?", assistant=" It"))
    tokens = [(smol.string(token), role) for token, role in zip(row, row.roles, strict=True)]
    assert tokens == [
        ("<|im_start|>", "template"), ("system", "template"), ("\n", "template"), ("Be", "system"), (" brief", "system"),
        (".", "system"), ("<|im_end|>", "template"), ("\n", "template"), ("<|im_start|>", "template"), ("user", "template"),
        ("\n", "template"), ("user", "user"), (" tea", "user"), ("?", "user"), ("<|im_end|>", "template"), ("\n", "template"),
        ("<|im_start|>", "template"), ("ass", "template"), ("istant", "template"), ("\n", "template"), (" It", "assistant"),
    ]  # fmt: skip
    # Mistral's system message stands in the user's turn; each letter here is one byte or a piece
    (row,) = as_rows(lms["mistral"], [SYSTEM, {"role": "user", "content": "Tea?"}])
    text = lms["mistral"].text(row)
    assert text == "<s>[INST] Say user.\n\nTea?[/INST]"
    assert "".join(letters(lms["mistral"], row)) == "t" * 10 + "s" * 9 + "t" * 2 + "u" * 4 + "t" * 7
    (row,) = as_rows(lms["gemma"], [{"role": "user", "content": " Tea? "}])
    assert (
        lms["gemma"].text(row)
        == "<s><start_of_turn>user\nTea?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "".join(letters(lms["gemma"], row)) == "t" * 23 + "u" * 4 + "t" * 35


def letters(lm, row):
    """The first letter of the role for each character of the text of a row."""
    for token, role in zip(row, row.roles, strict=True):
        yield role[0] * len(lm.text([token]))


def test_the_reasoning_of_an_earlier_turn_is_left_out_as_the_template_does(lms):
    thought = "<think>\nIt is early.\n</think>\n\nCoffee."
    messages = [
        QUESTION,
        {"role": "assistant", "content": thought},
        {"role": "user", "content": MORE},
    ]
    for family in ("qwen3", "deepseek"):
        lm = lms[family]
        (row,) = as_rows(lm, messages)
        spoken = lm.text([row[n] for n in find_positions(lm, row, hk.role("assistant"))])
        assert spoken.strip() == "Coffee."
        assert "early" not in lm.text(row)


@pytest.mark.parametrize(
    ("family", "variable"), [("qwen3", "enable_thinking"), ("granite", "thinking")]
)
def test_think_sets_the_variable_of_the_template(lms, family, variable):
    lm = lms[family]
    for think in (True, False):
        expected = lm.tokenizer.apply_chat_template(
            [QUESTION], add_generation_prompt=True, **{variable: think}
        )
        assert list(as_rows(lm, hk.chat(user=DRINK, think=think))[0]) == expected["input_ids"]
    with pytest.raises(
        BadPrompt, match="think=True, and this tokenizer's template writes the same with and"
    ):
        as_rows(lms["llama3"], hk.chat(user=DRINK, think=True))


def get_weather(city: str) -> str:
    """
    Returns the weather.

    Args:
        city: The name of the city.
    """
    return city


def test_tools_reach_the_template_or_raise(lms):
    chat = hk.chat(user=DRINK, tools=[get_weather])
    assert chat.tools[0]["function"]["name"] == "get_weather"
    lm = lms["qwen2_5"]
    expected = lm.tokenizer.apply_chat_template(
        [QUESTION], tools=[get_weather], add_generation_prompt=True
    )
    assert list(as_rows(lm, chat)[0]) == expected["input_ids"]
    with pytest.raises(BadPrompt, match="has tools, and this tokenizer's template ignores them"):
        as_rows(lms["llama3"], chat)
    with pytest.raises(BadPrompt, match="has no JSON schema"):
        hk.chat(user=DRINK, tools=[lambda x: x])


def test_what_a_template_refuses_or_ignores_raises(lms, llama):
    with pytest.raises(
        BadPrompt, match="refuses the chat: TemplateError: System role not supported"
    ):
        as_rows(lms["gemma"], hk.chat(system="Say user.", user=DRINK))
    with pytest.raises(BadPrompt, match="ignores message 1, the narrator's: 'It rains.'"):
        as_rows(lms["phi3"], [QUESTION, {"role": "narrator", "content": "It rains."}])
    with pytest.raises(BadPrompt, match="this tokenizer, a .*, has no chat template"):
        as_rows(llama, [QUESTION])
    with pytest.raises(BadPrompt, match="this model came without a tokenizer"):
        as_rows(hk.LM(llama.model), [QUESTION])


def test_a_template_that_rewrites_messages_gives_the_prompt_and_no_roles(lms):
    made = tokenizer_of("chatml")
    made.chat_template = TEMPLATES["chatml"].replace(
        "message['content']", "message['content'] | upper"
    )
    lm = hk.LM(lms["chatml"].model, made)
    run = hk.forward(lm, hk.chat(user="Tea?"))
    assert "TEA?" in run.text[0]
    assert run.roles == [()]
    assert "role" not in hk.surprisal(run)
    with pytest.raises(OutOfRange, match="is a chat whose messages its template changes"):
        hk.forward(lm, hk.chat(user="Tea?"), hk.ablate("z.1", pos=hk.role("user")))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hk.chat(), "a chat was given no message"),
        (lambda: hk.chat([]), "a chat was given no message"),
        (lambda: hk.chat([QUESTION], user="x"), "a list of messages and user= too"),
        (lambda: hk.chat([[QUESTION]]), "For several chats, give a list of them as the prompts"),
        (lambda: hk.chat([{"role": "user"}]), "message 0 of a chat, the user's, has None as its content"),
        (lambda: hk.chat([{"role": 3, "content": "x"}]), "has the role 3"),
        (lambda: hk.chat([{"role": "user", "content": [{"type": "image", "image": torch.zeros(1)}]}]), "no text, number"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(make, words):
    with pytest.raises(BadPrompt, match=words):
        make()


def test_one_message_and_unknown_keys_are_refused(lms):
    with pytest.raises(
        BadPrompt, match="prompt 0 is one message of a chat: give a list of messages"
    ):
        as_rows(lms["chatml"], QUESTION)
    with pytest.raises(BadPrompt, match="'messages' and 'temperature', which would be ignored"):
        as_rows(lms["chatml"], {"messages": [QUESTION], "temperature": 1})


def test_a_chat_is_a_value():
    chat = hk.chat(system="Be brief.", user="Tea?", think=False)
    assert chat == hk.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea?"}],
        think=False,
    )
    assert len({chat, copy.deepcopy(chat), hk.chat(user="Tea?")}) == 2
    fields = json.loads(chat.to_json())
    assert Chat(tuple(fields["messages"]), (), fields["think"]) == chat
    message = {"role": "user", "content": "Tea?"}
    made = hk.chat([message])
    message["content"] = "Coffee?"
    assert made == hk.chat(user="Tea?")


# ---- hooks


def wanted(lm, row, place):
    return list(find_positions(lm, row, place))


@pytest.mark.parametrize(
    "place", [hk.role("user"), hk.role("user", which=0), hk.turn(1), hk.TEMPLATE], ids=str
)
def test_a_hook_at_a_role_equals_a_hand_written_hook(lms, place):
    lm, messages = lms["llama3"], CONVERSATIONS["a system message and three turns"]
    (row,) = as_rows(lm, messages)
    positions = wanted(lm, row, place)

    def zero(module, args, output):
        output = output.clone()
        output[:, positions] = 0
        return output

    handle = lm.model.model.layers[1].mlp.register_forward_hook(zero)
    with torch.no_grad():
        expected = lm.model(torch.tensor([row])).logits
    handle.remove()
    run = hk.forward(lm, messages, hk.ablate("mlp_out.1", pos=place))
    assert torch.equal(run.logits, expected)
    assert not torch.equal(run.logits, hk.forward(lm, messages).logits)


def test_a_batch_of_chats_generates_as_each_alone(lms):
    lm = lms["chatml"]
    chats = [CONVERSATIONS["a system message and three turns"], hk.chat(user="Tea?"), [QUESTION]]
    hooks = [
        hk.ablate("mlp_out.1", pos=hk.role("user")), hk.ablate("z.0.1", pos=hk.TEMPLATE),
        hk.steer("resid_post.1", torch.linspace(-1, 1, 32), pos=hk.turn(-1)),
    ]  # fmt: skip
    settings = {"max_new_tokens": 4, "do_sample": False}
    together = hk.generate(lm, chats, *hooks, **settings)
    for row, chat in enumerate(chats):
        alone = hk.generate(lm, [chat], *hooks, **settings)
        assert alone.generated == [together.generated[row]]
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-4)
        log = together.log[(together.log["row"] == row) & (together.log["hook"] == 0)]
        positions = wanted(lm, together.prompts[row], hk.role("user"))
        assert str(positions[0]) in log["positions"].iloc[0]
        assert log["numbers"].sum() == 32 * len(positions)
    assert together.roles[1][-1] == "assistant"
    assert together.roles[1][: len(together.prompts[1])] == together.prompts[1].roles


def test_a_role_in_a_prompt_that_is_no_chat_raises_before_the_forward(lms):
    calls = []
    lm = lms["chatml"]
    handle = lm.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for place in (hk.role("user"), hk.turn(0), hk.TEMPLATE):
        with pytest.raises(OutOfRange, match="Tea' is no chat"):
            hk.forward(lm, "Tea", hk.ablate("z.1", pos=place))
    for place, words in (
        (hk.role("tool"), "the chat's messages are from user, in this order"),
        (hk.turn(1), "the chat's messages are from user"),
        (hk.role("user", which=1), "the chat's messages are from user"),
    ):
        with pytest.raises(OutOfRange, match=words):
            hk.forward(lm, [QUESTION], hk.ablate("z.1", pos=place))
    handle.remove()
    assert not calls


def test_roles_are_written_in_hooks_as_text_and_as_json():
    for text in ("ablate:z.1@pos=role('user')", "ablate:z.1@pos=role('user', which=-1)", "ablate:z.1@pos=turn(-1)", "ablate:z.1@pos=TEMPLATE"):  # fmt: skip
        hook = hk.parse_hook(text)
        assert hk.format_hook(hook) == text
        assert hk.parse_hook(hook.to_json()) == hook
        assert hk.parse_hook(text.replace("pos=", "")) == hook
    with pytest.raises(BadHook, match=r"role\('user'\)"):
        hk.ablate("z.1", pos="user")
    hook = hk.patch("resid_post.1", hk.chat(user="Tea?"), pos=hk.role("user"))
    assert hk.parse_hook(hook.to_json()) == hook


def test_a_patch_from_a_chat_pairs_the_tokens_of_a_role(lms):
    lm = lms["chatml"]
    source, target = hk.chat(system="Be brief.", user="Tea?"), hk.chat(user="Tea?")
    clean = hk.forward(lm, source, hk.capture("resid_post.1"))
    patched = hk.forward(
        lm,
        target,
        hk.patch("resid_post.1", source, pos=hk.role("user")),
        hk.capture("resid_post.1"),
    )
    run = hk.forward(lm, target, hk.patch("resid_post.1", clean, pos=hk.role("user")))
    at, from_ = (
        wanted(lm, prompts[0], hk.role("user")) for prompts in (patched.prompts, clean.prompts)
    )
    assert at != from_
    assert torch.equal(patched["resid_post.1"][0, at], clean["resid_post.1"][0, from_])
    assert torch.equal(run.logits, patched.logits)


# ---- BOS


def test_a_text_that_begins_with_the_bos_raises_where_the_tokenizer_adds_one(lms, llama, tmp_path):
    lm = lms["llama3"]
    rendered = lm.tokenizer.apply_chat_template([QUESTION], tokenize=False)
    for read in (
        lambda text: hk.forward(lm, text),
        lambda text: hk.forward(lm, ["Tea", text]),
        lambda text: hk.harvest(lm, [text], "resid_post.1", folder=tmp_path / "harvest"),
    ):
        with pytest.raises(BadPrompt, match=r"begins with '<s>'.*twice.*hk.chat\(user='…'\)"):
            read(rendered)
    assert as_rows(lm, "Tea <s> tea")[0].count(0) == 2  # in the middle it is the user's own
    assert as_rows(lm, lm.tokenizer.encode(rendered))  # ids are read as they are
    assert as_rows(llama, "<s> Tea")[0].count(0) == 1  # this tokenizer adds none


# ---- everywhere


def test_chats_go_where_prompts_go(lms, tmp_path):
    lm = lms["chatml"]
    chat = hk.chat(system="Be brief.", user="Tea?")
    ids = list(as_rows(lm, chat)[0])
    logit = hk.metrics.logit(5)
    assert hk.token_attribution(lm, chat, logit)["role"].iloc[-1] == "template"
    hook = [hk.ablate("mlp_out.1", pos=hk.role("user"))]
    table = hk.sweep(lm, chat, {"layer": [1]}, lambda layer: hook, logit)
    edited = hk.forward(lm, chat, *hook)
    assert table["logit"].iloc[0] == pytest.approx(float(edited.logits[0, -1, 5]), abs=1e-5)
    losses = hk.token_losses(lm, [" tea", " milk"], *hook, prefix=chat)
    joined = hk.forward(lm, [[*ids, *lm.encode(" tea")]], *[
        hk.ablate("mlp_out.1", pos=wanted(lm, as_rows(lm, chat)[0], hk.role("user")))
    ])  # fmt: skip
    expected = hk.surprisal(joined)
    expected = expected[expected["pos"] >= len(ids)]["loss"].tolist()
    assert losses[losses["row"] == 0]["loss"].tolist() == pytest.approx(expected, abs=1e-4)
    assert set(losses["role"]) == {"assistant"}
    with pytest.raises(BadPrompt, match="cannot follow the prompts in prefix="):
        hk.token_losses(lm, [chat], prefix="Tea")
    pairs = hk.types.Pairs("mine", [chat], [hk.chat(system="Be brief.", user="Tea!")], [5], [6])
    assert len(pairs.check(lm)) == 1
    folder = tmp_path / "harvest"
    file = tmp_path / "chats.jsonl"
    lines = [{"messages": [QUESTION], "id": 7}, {"text": "Tea"}]
    file.write_text("\n".join(map(json.dumps, lines[:1])) + "\n")
    harvest = hk.harvest(lm, file, "resid_post.1", folder=folder, pos=hk.role("user"))
    run = hk.forward(lm, [QUESTION], hk.capture("resid_post.1", pos=hk.role("user")))
    assert torch.allclose(harvest["resid_post.1"][:], run["resid_post.1"][0], atol=1e-5)


def test_surprisal_and_uncertainty_have_a_column_of_roles(lms):
    lm = lms["chatml"]
    run = hk.forward(lm, [[QUESTION], "Tea is hot"])
    table = hk.surprisal(run)
    assert list(table.columns[:3]) == ["row", "pos", "role"]
    expected = [run.prompts[0].roles[pos] for pos in table[table["row"] == 0]["pos"]]
    assert table[table["row"] == 0]["role"].tolist() == expected
    assert set(table[table["row"] == 1]["role"]) == {""}
    shift = hk.surprisal_shift(run, hk.forward(lm, [[QUESTION], "Tea is hot"], hk.skip_block(1)))
    assert shift["role"].tolist() == table["role"].tolist()
    certain = hk.uncertainty(run, pos=hk.role("user"), rows=0)
    assert set(certain["role"]) == {"user"}
    assert "role" not in hk.surprisal(hk.forward(lm, "Tea is hot"))
