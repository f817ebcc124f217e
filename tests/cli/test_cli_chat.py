"""hookkit --chat and --system, and files of chats."""

import json

import pytest

import hookkit as hk

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


@pytest.fixture
def chatty(llama, monkeypatch):
    """The tiny model of the command line, with a chat template."""
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)
    return llama


def rows_of(done, name):
    """The rows of a table in the JSON of a command."""
    printed = json.loads(done.stdout)
    return printed if isinstance(printed, list) else printed[name]


def test_the_options_make_the_prompt_a_users_message(hookkit, chatty):
    chat = hk.chat(system="Be brief.", user="Tea?")
    expected = hk.ranks(hk.forward(chatty, chat), top=3)["token_id"].tolist()
    done = hookkit("ranks", "--chat", "--system", "Be brief.", "Tea?", "--top", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert [row["token_id"] for row in rows_of(done, "ranks")] == expected
    settings = {"max_new_tokens": 3, "do_sample": False}
    run = hk.generate(chatty, chat, **settings)
    words = ["--chat", "--system", "Be brief.", "Tea?", "--max-new-tokens", "3"]
    assert hookkit("generate", *words).stdout == f"{run.generated[0]}\n"
    (row,) = rows_of(hookkit("generate", *words, "--json"), "generated")
    assert row["prompt"] == "system: Be brief. user: Tea?"
    hook = ["--hook", "ablate:mlp_out.1@role('user')"]
    shifted = hookkit("shift", "--chat", "Tea?", *hook, "--json")
    after = hk.forward(chatty, hk.chat(user="Tea?"), hk.ablate("mlp_out.1", pos=hk.role("user")))
    table = hk.rank_shift(hk.forward(chatty, hk.chat(user="Tea?")), after)
    found = [row["rank_after"] for row in rows_of(shifted, "shifts")]
    assert found == table["rank_after"].tolist()
    losses = rows_of(hookkit("surprisal", "--chat", "Tea?", "--json"), "surprisal")
    assert {row["role"] for row in losses} == {"user", "template"}
    scanned = hookkit("scan", "--chat", "--system", "Be brief.", "Tea?")
    assert scanned.exit_code == 0, scanned.stderr
    assert "'Tea?' --watch" not in scanned.stdout or "--chat --system 'Be brief.'" in scanned.stdout
    pair = hookkit("patch", "--chat", "Tea?", "Tea!", "--token", "e", "--against", "a", "--json")
    assert pair.exit_code == 0, pair.stderr


def test_a_file_of_json_lines_has_texts_and_chats(hookkit, chatty, tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Tea?"}]
    file.write_text("\n".join(map(json.dumps, [{"messages": messages}, {"text": "Tea"}, "Ale"])))
    done = hookkit("ranks", "--prompts", str(file), "--top", "1", "--json")
    assert done.exit_code == 0, done.stderr
    expected = hk.ranks(hk.forward(chatty, [messages, "Tea", "Ale"]), top=1)["token_id"].tolist()
    assert [row["token_id"] for row in rows_of(done, "ranks")] == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ranks", "--system", "x", "Tea"], "--system is the first message of a chat: add --chat"),
        (["ranks", "--prompts", "chats.jsonl", "--chat"], "has chats already: leave --chat and"),
        (["ranks", "--prompts", "wrong.jsonl"], "line 1 is no prompt"),
        (["ranks", "--prompts", "broken.jsonl"], "line 1"),
    ],
)
def test_what_would_be_ignored_is_refused(hookkit, chatty, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "Tea"}\n')
    (tmp_path / "broken.jsonl").write_text("{Tea\n")
    done = hookkit(*words)
    assert done.exit_code == 2
    assert reason in " ".join(done.stderr.split())
