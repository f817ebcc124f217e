"""Masked language models: sites, padding, positions of masks, sweeps, and what is refused with a reason."""

import dataclasses

import by_hand_encoders
import pytest
import torch
from by_hand_encoders import outputs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

import hookkit as hk
from hookkit.errors import MissingSite, Unsupported
from hookkit.models.discovery.discover import discover_family
from hookkit.models.families.encoders import ENCODERS
from hookkit.models.padding import can_pad
from hookkit.models.sites import AXES
from hookkit.models.views import is_hidden

IDS = [5, 9, 17, 200, 33, 41, 7, 90, 12]
ROWS = [IDS, [40, 41, 42], [8, 60, 13, 77, 101]]
RELATIONS = ("pos_embed", "scores", "q_rot", "k_rot")  # checked by a relation to other sites
BY_HAND = [*by_hand_encoders.NAMES, "modernbert", "esm"]
UNLISTED = ("big_bird", "eurobert", "jina_embeddings_v3", "megatron-bert", "nomic_bert", "roformer")
WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "[UNK]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "dog",
    "a",
    "ran",
    "Mary",
    "gave",
    "book",
    "to",
    ".",
]
MASK = hk.at("[MASK]")
PROMPTS = ["the cat sat on the [MASK] .", "a [MASK] ran ."]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
CAT_OR_DOG = hk.metrics.logit_diff("cat", "dog")


def tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", **special)


@pytest.fixture(scope="module")
def lm() -> hk.LM:
    return hk.tiny("roberta", tokenizer=tokenizer())


def made(name: str) -> hk.LM:
    """The tiny model; "esm absolute" has an embedding of positions, which begin at padding_idx + 1."""
    if name == "esm absolute":
        return hk.tiny("esm", config={"position_embedding_type": "absolute"})
    return hk.tiny(name)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) / max(1e-3, float(expected.abs().max()))


def adding(pos: int):
    """A hook for register_forward_hook that adds VECTOR to a block's output at one position."""

    def hook(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        changed = stream.index_add(1, torch.tensor([pos]), VECTOR.view(1, 1, -1))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def alone(lm: hk.LM, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([row])).logits[0]


# ---- sites


@pytest.mark.parametrize("model_type", BY_HAND)
def test_every_site_holds_what_the_weights_and_transformers_own_outputs_give(model_type):
    lm = hk.tiny(model_type)
    expected = by_hand_encoders.sites(lm.model, IDS, model_type)
    run = hk.forward(lm, [IDS], hk.capture(lm.sites()))
    names = {str(site) for site in lm.sites()}
    assert {name for name in names if name.split(".")[0] not in RELATIONS} == set(expected)
    for name, values in expected.items():
        found = run.logits if name == "logits" else run[name]
        assert apart(found, values) < 2e-5, name
    for layer in range(lm.n_layers):
        scores = run[f"scores.{layer}"]
        assert apart(scores.softmax(-1), expected[f"pattern.{layer}"]) < 2e-5
        if "q_rot" in lm.layout.names:
            query, key = run[f"q_rot.{layer}"], run[f"k_rot.{layer}"]
            scale = 1.0 if model_type == "esm" else 8**-0.5
            products = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
            seen = ~is_hidden(scores)
            assert apart(products.where(seen, 0), scores.where(seen, 0)) < 2e-5
    if "pos_embed" in lm.layout.names:
        table = lm.submodule(lm.location(hk.Site("pos_embed")).path)
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        assert torch.equal(run["pos_embed"][0], table.weight[first : first + len(IDS)])


@pytest.mark.parametrize("model_type", [*ENCODERS, *UNLISTED, "esm absolute"])
def test_every_law_holds_or_the_exception_stands_in_the_row(model_type):
    lm = made(model_type)
    assert lm.is_masked and lm.family.found == (model_type in UNLISTED)
    proof = hk.check_laws(lm)
    broken = proof[~proof["holds"] & ~proof["note"].str.startswith("exception: ")]
    assert broken.empty, broken.to_string()
    excused = proof[~proof["holds"]]
    used = {*excused["law"], *(excused["law"] + " " + excused["site"])}
    assert {*lm.family.exceptions} <= used
    assert not {"writing", "without cache"} & {*proof["law"]}
    for name in AXES:
        reason = lm.family.why_missing(name)
        assert name in lm.layout.names or "has no place for it" not in reason, name


@pytest.mark.parametrize(
    "model_type", [name for name in ENCODERS if name not in ("albert", "xmod")]
)
def test_a_dry_run_finds_the_sites_of_the_row_with_the_same_values(model_type):
    lm = hk.tiny(model_type)
    found = hk.LM(lm.model, row=discover_family(lm.model, lm.config))
    lost = {*lm.layout.names} - {*found.layout.names}
    allowed = {"esm": {"mlp_pre"}, "electra": {"embed", "final_norm"}}.get(model_type, set())
    assert lost <= {"pos_embed"} | allowed and not {*found.layout.names} - {*lm.layout.names}
    assert found.family.stream_norms == lm.family.stream_norms
    sites = [site for site in lm.sites() if site.name in found.layout.names]
    expected = hk.forward(lm, ROWS, hk.capture(sites))
    values = hk.forward(found, ROWS, hk.capture(sites))
    assert all(torch.equal(values[site], expected[site]) for site in sites)


def test_a_wrong_norm_of_the_stream_is_caught_by_the_laws():
    lm = hk.tiny("bert")
    norms = {"resid_mid": ".output.LayerNorm", "resid_post": ".output.LayerNorm"}
    row = dataclasses.replace(lm.family, stream_norms=norms)
    failed = hk.check_laws(hk.LM(lm.model, row=row)).query("~holds")
    assert {"sum"} == {*failed["law"]} and "resid_mid" in {*failed["site"]}


def test_the_one_block_of_albert_has_no_sites_by_layer_and_says_why():
    lm = hk.tiny("albert")
    with pytest.raises(MissingSite, match="runs the same block at every layer"):
        hk.forward(lm, [IDS], hk.capture("resid_post.0"))
    run = hk.forward(lm, [IDS], hk.capture(["final_norm", "embed"]))
    assert run["final_norm"].shape == run["embed"].shape == (1, 9, 16)
    assert torch.equal(run.logits[0], alone(lm, IDS))


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "esm"])
def test_an_edit_of_the_stream_does_what_a_hand_written_hook_does(model_type):
    lm = hk.tiny(model_type)
    block = lm.model.get_submodule(lm.family.block.format(layer=1))

    handle = block.register_forward_hook(adding(2))
    expected = alone(lm, IDS)
    handle.remove()
    steered = hk.forward(lm, [IDS], hk.steer("resid_post.1", VECTOR, pos=2)).logits[0]
    assert torch.equal(steered, expected)
    assert float((steered - alone(lm, IDS))[0].abs().max()) > 1e-3  # the first token sees the third


# ---- padding


@pytest.mark.parametrize("model_type", [*ENCODERS, "esm absolute"])
def test_a_padded_row_has_the_logits_of_the_row_alone(model_type):
    lm = made(model_type)
    everywhere, last = hk.forward(lm, ROWS).logits, hk.forward(lm, ROWS, logits="last").logits
    assert can_pad(lm, "left") and can_pad(lm, "right")
    for number, row in enumerate(ROWS):
        expected = alone(lm, row)
        assert torch.allclose(everywhere[number, : len(row)], expected, atol=1e-4)
        assert torch.allclose(last[number, 0], expected[-1], atol=1e-4)


# ---- the position of a mask


def test_ranks_and_hooks_act_at_the_mask_of_each_prompt(lm):
    run = hk.forward(lm, PROMPTS)
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    columns = [row.index(lm.tokenizer.mask_token_id) for row in ids]
    table = hk.ranks(run, pos=MASK, top=1)
    best = [
        int(alone(lm, row)[column, :18].argmax()) for row, column in zip(ids, columns, strict=True)
    ]
    assert table["pos"].tolist() == columns and table["token_id"].tolist() == best
    forced = hk.forward(lm, PROMPTS, hk.force("dog", pos=MASK))
    assert hk.ranks(forced, pos=MASK, top=1)["token"].tolist() == ["dog", "dog"]
    changed = (forced.logits != run.logits).any(-1)
    assert changed.nonzero().tolist() == [[row, column] for row, column in enumerate(columns)]
    banned = hk.forward(lm, PROMPTS, hk.ban("dog", pos=MASK))
    shift = hk.rank_shift(run, banned, pos=MASK, watch="dog").query("token == 'dog'")
    assert (shift["rank_after"] == len(WORDS)).all()


@pytest.mark.parametrize("hook", [hk.force("dog"), hk.ban("dog", step=0), hk.boost("dog", by=3.0)])
def test_a_hook_on_logits_without_a_position_says_to_name_the_mask(lm, hook):
    with pytest.raises(Unsupported, match=r"such as pos=hk\.at\('\[MASK\]'\)"):
        hk.forward(lm, PROMPTS, hook)


def test_functions_about_the_next_token_are_refused_with_the_reason(lm):
    run = hk.forward(lm, PROMPTS)
    calls = {
        "has no generate.*masked language model": lambda: hk.generate(lm, PROMPTS),
        "logits are for the token at the same position": lambda: hk.surprisal(run),
        "its logits are for the token": lambda: hk.token_losses(lm, PROMPTS),
        "writes no next token": lambda: hk.ranks(run),
        "about the token after each prompt": lambda: hk.shift_report(
            lm, PROMPTS, hk.ablate("z.1.2")
        ),
        "its blocks normalise the stream": lambda: hk.edge_attribution(
            lm, PROMPTS[0], "the dog sat on the [MASK] .", CAT_OR_DOG
        ),
        "the loss of a continuation has no meaning": lambda: hk.sweep(
            lm,
            PROMPTS,
            {"layer": [0]},
            lambda layer: hk.ablate(f"z.{layer}"),
            hk.metrics.loss("dog"),
        ),
    }
    for words, call in calls.items():
        with pytest.raises(Unsupported, match=words):
            call()


# ---- sweeps, lenses and checkups


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "deberta-v2"])
def test_a_sweep_equals_a_loop_of_forwards_by_hand(model_type):
    lm = hk.tiny(model_type, tokenizer=tokenizer())
    prompts = ["the cat sat on the [MASK] .", "a dog ran to the [MASK] on the mat ."]

    def hooks(layer: int, pos: int):
        return hk.steer(hk.Site("resid_post", layer), VECTOR, pos=pos)

    grid = {"layer": [0, 1, 2], "pos": [1, 6, 8]}
    table = hk.sweep(lm, prompts, grid, hooks, CAT_OR_DOG, pos=6)
    cat, dog = lm.token("cat"), lm.token("dog")
    for row in table.to_dict(orient="records"):
        block = lm.model.get_submodule(lm.family.block.format(layer=row["layer"]))
        handle = block.register_forward_hook(adding(row["pos"]))
        logits = alone(lm, lm.tokenizer(prompts[row["row"]])["input_ids"])[6]
        handle.remove()
        assert row["logit_diff"] == pytest.approx(float(logits[cat] - logits[dog]), abs=1e-4)
    # an edit after the metric's position counts too
    assert (table.query("pos == 8 and layer < 2")["logit_diff_delta"].abs() > 1e-4).all()


@pytest.mark.parametrize("model_type", ["bert", "electra", "esm"])
def test_the_lens_of_the_last_layer_gives_the_logits_of_the_model(model_type):
    lm = hk.tiny(model_type, tokenizer=tokenizer())
    lens = hk.logit_lens(lm, PROMPTS[0], sites="resid_post", pos=MASK, top=3)
    last = lens[lens["site"] == "resid_post.2"]
    expected = hk.ranks(hk.forward(lm, PROMPTS[:1]), pos=MASK, top=3)
    assert last["token"].tolist() == expected["token"].tolist()
    assert last["logit"].tolist() == pytest.approx(expected["logit"].tolist(), abs=1e-4)


def test_the_laws_put_no_padding_into_a_text_of_a_small_vocabulary(lm):
    assert hk.check_laws(lm, layers=[1]).query("law == 'batch'")["holds"].all()


def test_a_checkup_says_that_the_model_is_a_masked_one():
    checkup = hk.doctor(hk.tiny("roberta"))
    assert checkup.healthy and checkup.sites.query("blocks != ''")["proved"].all()
    assert "masked language model" in checkup.notes[0]


def test_a_folder_of_a_masked_model_is_loaded_with_its_head(tmp_path):
    tiny = hk.tiny("distilbert", tokenizer=tokenizer())
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    lm, plain = hk.load(tmp_path), AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert lm.is_masked
    expected = outputs(plain, lm.tokenizer(PROMPTS[0])["input_ids"]).hidden_states
    run = hk.forward(lm, PROMPTS[0], hk.capture("resid_pre"))
    for layer in range(3):
        assert torch.allclose(run[f"resid_pre.{layer}"], expected[layer], atol=1e-5)
