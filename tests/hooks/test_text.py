"""Hooks as short texts: what each means, the way there and back, and what is said of a text that is none."""

import json

import pytest
import torch
import yaml

import hookkit as hk
from hookkit.errors import (  # fmt: skip
    BadFile,
    BadHook,
    EmptySelection,
    NotOneToken,
    OtherModel,
    OutOfRange,
    UnknownKeyword,
    UnknownSite,
)
from hookkit.hooks.serialization import HOOK_TYPES
from hookkit.hooks.text import PARSERS

SHORT = {
    "ablate:z.9.3": hk.ablate("z.9.3"),
    "ablate:resid_post": hk.ablate("resid_post"),
    "ablate:z.9.3, z.10.0@-1": hk.ablate(["z.9.3", "z.10.0"], pos=-1),
    "ablate:mlp_post.12@units=[7,1001],rows=0": hk.ablate("mlp_post.12", units=[7, 1001], rows=0),
    "ablate:z.9@to=mean,over=['Tea with milk', 'A cup'],per=all": hk.ablate(
        "z.9", to="mean", over=["Tea with milk", "A cup"], per="all"
    ),
    "ablate:model.layers.3.mlp:output": hk.ablate(hk.module("model.layers.3.mlp")),
    "ablate:resid_mid.3@at('store')": hk.ablate("resid_mid.3", pos=hk.at("store")),
    "ablate:resid_mid.3@pos=at('a, b@0', which=-1)": hk.ablate(
        "resid_mid.3", pos=hk.at("a, b@0", which=-1)
    ),
    "ablate:resid_mid.3@PROMPT": hk.ablate("resid_mid.3", pos=hk.PROMPT),
    "ablate:resid_mid.3@1:,rows=[0,2]": hk.ablate("resid_mid.3", pos=slice(1, None), rows=[0, 2]),
    "capture:resid_post.6@-1,name=before": hk.capture("resid_post.6", pos=-1, name="before"),
    "scale:mlp_out.4*0.5": hk.scale("mlp_out.4", 0.5),
    "scale:mlp_out.4,mlp_out.5*-1@0": hk.scale(["mlp_out.4", "mlp_out.5"], -1.0, pos=0),
    "skip_block:3": hk.skip_block(3),
    "skip_block:3,5@rows=1": hk.skip_block([3, 5], rows=1),
    "knockout:9.3@query=-1,key=at('Mary')": hk.knockout(9, 3, query=-1, key=hk.at("Mary")),
    "knockout:9.3,9.4,10.3,10.4@-1,key=0": hk.knockout([9, 10], [3, 4], query=-1, key=0),
    "knockout:9,10@key=[0,1]": hk.knockout([9, 10], key=[0, 1]),
    "force: coffee": hk.force(" coffee"),
    "force: coffee@0": hk.force(" coffee", step=0),
    "force: coffee@step=[0,2],margin=inf": hk.force(" coffee", step=[0, 2], margin=float("inf")),
    "force: coffee@when=entropy_above(2.0)": hk.force(" coffee", when=hk.when.entropy_above(2.0)),
    "force:word(' a cup, of tea', exact=True)@3": hk.force(
        hk.word(" a cup, of tea", exact=True), step=3
    ),
    "force: me@home": hk.force(" me@home"),
    "force:' @0'@1": hk.force(" @0", step=1),
    "force: don't@0": hk.force(" don't", step=0),
    "ban: coffee, tea": hk.ban(" coffee", " tea"),
    "ban:',',id(28),' \\n'": hk.ban(",", 28, " \n"),
    "ban: tea@when=rank_of(' @,', at_most=3)": hk.ban(
        " tea", when=hk.when.rank_of(" @,", at_most=3)
    ),
    "restrict: yes, no": hk.restrict(" yes", " no"),
    "boost: tea=2.5": hk.boost(" tea", by=2.5),
    "boost: tea=2.5, coffee=-1": hk.boost(by={" tea": 2.5, " coffee": -1}),
    "boost: tea, coffee@by=2": hk.boost(" tea", " coffee", by=2),
    "boost:'=='=2": hk.boost("==", by=2),
    "cap: coffee@prob=0.1": hk.cap(" coffee", prob=0.1),
    "swap: coffee, tea@step=0": hk.swap(" coffee", " tea", step=0),
    "set_rank: coffee=3": hk.set_rank(" coffee", 3),
    "away_from:Who wrote it? He@by=0.5": hk.away_from("Who wrote it? He", by=0.5),
    "toward: me@home@by=1,plausible=0.1": hk.toward(" me@home", by=1, plausible=0.1),
    "away_from:UNEDITED@0,by=-1": hk.away_from(hk.UNEDITED, by=-1, step=0),
    "away_from:resid_post.6@by=1": hk.away_from(hk.Site("resid_post", 6), by=1),
}


@pytest.mark.parametrize("text", SHORT)
def test_a_text_means_what_the_function_of_its_verb_makes(text):
    assert hk.parse_hook(text) == SHORT[text]


@pytest.mark.parametrize("made", SHORT.values(), ids=SHORT)
def test_what_is_spelled_is_short_and_read_back_as_the_same_hook(made):
    text = hk.format_hook(made)
    assert text.startswith(f"{made.verb}:") and hk.parse_hook(text) == made


def test_a_hook_without_a_short_form_is_spelled_as_json():
    for made in (hk.steer("resid_post.6", torch.ones(4)), hk.project_out("resid_post.6", torch.ones(4)),
                 hk.ablate("z.1", to=torch.ones(4)), hk.ban(" tea", site="lm_head"),
                 hk.toward(["a", "b"], by=1), hk.toward([5, 6], by=1), hk.toward("UNEDITED", by=1)):  # fmt: skip
        assert json.loads(hk.format_hook(made))["hook"] == made.verb
        assert hk.parse_hook(hk.format_hook(made)) == made


def test_every_verb_but_that_of_a_function_can_be_written():
    assert {*PARSERS} == {*HOOK_TYPES} - {"edit", "randomised", "swap_concept"}
    with pytest.raises(BadHook, match="an edit needs a function, which no text holds"):
        hk.parse_hook("edit:mlp_out.3")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "ablate z.9.3",
            BadHook,
            "'ablate z.9.3' spells no hook: write VERB:WHAT@WHERE, such as 'ablate:z.9.3'",
        ),
        ("", BadHook, "'' spells no hook"),
        (
            "ablat:z.9.3",
            BadHook,
            "there is no hook 'ablat'; did you mean 'ablate'? There are: ablate, patch",
        ),
        ("ablate:", BadHook, "names no site where one is meant: write ablate:resid_post.6"),
        ("ablate:resid_pots.6", UnknownSite, "did you mean 'resid_post'"),
        (
            "ablate:z.9.3:more",
            BadHook,
            "has ':more' after its sites, where only @ and settings may stand",
        ),
        (
            "ablate:z.9.3@posn=-1",
            UnknownKeyword,
            "ablate() has no keyword 'posn'; did you mean 'pos'?",
        ),
        ("ablate:z.9.3@step=0", UnknownKeyword, "ablate() has no keyword 'step'"),
        ("ablate:z.9.3@pos=first", BadHook, "pos='first' is not valid"),
        ("ablate:z.9@to=mean", BadHook, "needs a reference"),
        ("scale:mlp_out.4", BadHook, "is no amount for 'mlp_out.4': write scale:mlp_out.4*0.5"),
        (
            "skip_block:resid_post.3",
            BadHook,
            "has 'resid_post.3' where a block's number is meant: write skip_block:3",
        ),
        ("knockout:9.3", EmptySelection, "knockout needs the keys"),
        (
            "knockout:9.3,10.4@key=0",
            BadHook,
            "no grid of layers and heads: give a hook for each layer",
        ),
        ("force:", BadHook, "names an empty token: write force: coffee"),
        ("ban: tea,", BadHook, "names an empty token"),
        ("boost: tea", BadHook, "'boost: tea' is no amount for ' tea': write boost: tea=2.5"),
        ("boost: tea=1, tea=2", BadHook, "boosts ' tea' twice"),
        ("boost: tea=much", BadHook, "is no amount for ' tea=much'"),
        ("swap: tea", BadHook, "names 1 tokens, and two change places"),
        ("set_rank: tea=1.5", OutOfRange, "rank=1.5: ranks are whole numbers"),
        (
            "steer:mood.safetensors*3",
            BadHook,
            "there is no file 'mood.safetensors': write steer:FILE, or steer:SITE:FILE",
        ),
        (
            "steer:resid_post.6:mood.safetensors",
            BadHook,
            "is checked against a model: hk.parse_hook(text, lm=lm)",
        ),
        ("patch:resid_post.6", BadHook, "has no prompt to patch from"),
    ],
)
def test_a_text_that_is_no_hook_says_what_to_write(text, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        hk.parse_hook(text)
    assert message in str(raised.value)


def test_several_tokens_are_a_phrase_where_a_model_says_so_and_refused_where_one_is_meant(llama):
    assert hk.parse_hook("force: green tea@0", lm=llama) == hk.force(
        hk.word(" green tea", exact=True), step=0
    )
    assert hk.parse_hook("ban: coffee, green tea", lm=llama) == hk.ban(
        " coffee", hk.word(" green tea", exact=True)
    )
    with pytest.raises(NotOneToken, match="one is meant"):
        hk.forward(llama, "I like", hk.parse_hook("boost: green tea=2", lm=llama))


def test_a_patch_takes_what_its_prompt_has_there(llama):
    made = hk.parse_hook("patch:resid_post.1:She takes green tea with@-1", lm=llama)
    source = hk.forward(llama, "She takes green tea with", hk.capture("resid_post.1"))
    found = hk.forward(llama, "I like oat milk in my", made, logits="last").logits
    assert torch.equal(found, hk.forward(llama, "I like oat milk in my", hk.patch("resid_post.1", source, pos=-1), logits="last").logits)  # fmt: skip


def test_a_steering_vector_comes_from_its_file(llama, gpt2, tmp_path):
    vector = hk.mean_difference(llama, "I love it", "I hate it", "resid_post.1")[0]
    path = vector.save(tmp_path / "mood.safetensors")
    assert hk.parse_hook(f"steer:{path}*3", lm=llama) == vector.steer(scale=3.0)
    assert hk.parse_hook(f"steer:{path}@dose=0.3,pos=-1", lm=llama) == vector.steer(
        dose=0.3, pos=-1
    )
    assert hk.parse_hook(f"steer:resid_post.1:{path}", lm=llama) == vector.steer()
    assert hk.parse_hook(f"steer:resid_post.2:{path}*-2", lm=llama) == hk.steer(
        "resid_post.2", vector.tensor, scale=-2.0
    )
    assert hk.parse_hook(f"project_out:{path}", lm=llama) == hk.project_out(
        "resid_post.1", vector.tensor
    )
    for text, message in (
        ("*2@dose=1", "says twice how much"),
        ("*2@scale=1", "says twice how much"),
    ):
        with pytest.raises(BadHook, match=message):
            hk.parse_hook(f"steer:{path}{text}", lm=llama)
    with pytest.raises(BadHook, match="a dose is of the stream's length at resid_post.1"):
        hk.parse_hook(f"steer:resid_post.2:{path}@dose=1", lm=llama)
    with pytest.raises(OtherModel):
        hk.parse_hook(f"steer:{path}", lm=gpt2)
    (tmp_path / "other").write_text("no vector")
    with pytest.raises(BadFile, match="is no file of a vector that can be read"):
        hk.parse_hook(f"steer:{tmp_path / 'other'}", lm=llama)


def test_a_file_has_short_texts_and_whatever_to_json_wrote(tmp_path):
    hooks = [
        hk.ablate("z.9.3"),
        hk.force(" coffee", step=0),
        hk.steer("resid_post.6", torch.ones(4)),
    ]
    written = ["ablate:z.9.3", "force: coffee@0", json.loads(hooks[2].to_json())]
    (tmp_path / "hooks.json").write_text(json.dumps(written))
    (tmp_path / "hooks.yaml").write_text(yaml.safe_dump(written))
    assert hk.load_hooks(tmp_path / "hooks.json") == hk.load_hooks(tmp_path / "hooks.yaml") == hooks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "has no list of hooks: write a line for each"),
        ("ablate:z.9.3", "has no list of hooks"),
        ("- force: coffee@0", 'a short text without quotes: write - "force: coffee@0"'),
        ("- 3", "has 3, which is no hook"),
        ("- [", "is neither YAML nor JSON"),
        ("- {hook: ablate}", "a ablate has the fields"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, words, message):
    (tmp_path / "hooks.yaml").write_text(words)
    with pytest.raises(BadHook) as raised:
        hk.load_hooks(tmp_path / "hooks.yaml")
    assert message in str(raised.value)
