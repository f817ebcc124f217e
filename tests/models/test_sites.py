"""Naming places: sites as text and as values, selections, and the words of every refusal."""

import pytest

import hookkit as hk
from hookkit.errors import (
    BadHook,
    EmptySelection,
    MissingSite,
    OutOfRange,
    UnknownKeyword,
    UnknownSite,
)
from hookkit.models.sites import AXES, CROSS_SITES, ModuleSite, as_sites, parse_site


@pytest.mark.parametrize(
    "text",
    [
        "logits",
        "resid_post.6",
        "z.9.3",
        "model.layers.3.mlp:output",
        "a.b:input:mask",
        "x:output:1",
    ],
)
def test_a_site_is_its_text(text):
    assert str(parse_site(text)) == text
    assert parse_site(str(parse_site(text))) == parse_site(text)


def test_a_module_is_named_by_path_and_side():
    assert hk.module("a.b") == ModuleSite("a.b", "output", 0)
    assert str(hk.module("a.b", side="input", item="mask")) == "a.b:input:mask"


@pytest.mark.parametrize(
    ("site", "axes"),
    [
        ("resid_post.1", "batch pos d_model"),
        ("z.1", "batch pos head d_head"),
        ("z.1.0", "batch pos d_head"),
        ("k.1.0", "batch pos d_head"),
    ],
)
def test_a_site_says_its_axes(site, axes):
    assert parse_site(site).axes == axes


def test_a_misspelt_name_is_refused_with_the_nearest_one():
    with pytest.raises(
        UnknownSite, match=r"no site 'resid_pots'; did you mean 'resid_post'.*The sites are: embed"
    ):
        hk.capture("resid_pots.6")
    with pytest.raises(UnknownSite, match="does not name a site; sites look like"):
        hk.capture("model.layers.3.mlp")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hk.Site("z", 1.5), "the layer of 'z' is 1.5"),
        (lambda: hk.Site("logits", 3), "'logits' exists once in the model and has no layer 3"),
        (
            lambda: hk.Site("resid_post", 3, 1),
            "'resid_post' has no heads; the sites with heads are",
        ),
        (lambda: hk.Site("z", None, 3), "head 3 of 'z' needs a layer"),
        (
            lambda: hk.module("a", side="middle"),
            "side='middle': a module has side='input' and side='output'",
        ),
        (lambda: as_sites([3]), "3 is not a site"),
    ],
)
def test_a_place_that_cannot_be_is_refused_when_it_is_named(make, words):
    with pytest.raises(UnknownSite, match=words):
        make()


@pytest.mark.parametrize(
    "make", [lambda: hk.Site("resid_post", -1), lambda: hk.capture("resid_post.-1")]
)
def test_layers_count_from_0_upwards(make):
    with pytest.raises(
        OutOfRange, match="layer -1 of 'resid_post' was asked for: layers count from 0 upwards"
    ):
        make()


def test_a_selection_is_counted_and_printed_before_anything_runs(llama):
    chosen = llama.sites("z", layers=[0, 2], heads=[1, 3])
    assert [str(site) for site in chosen] == ["z.0.1", "z.0.3", "z.2.1", "z.2.3"]
    assert repr(chosen) == "4 sites: z.0.1, z.0.3, z.2.1, z.2.3"
    assert repr(llama.sites("resid_post") + llama.sites("mlp_out") + "logits") == (
        "7 sites: resid_post.0, resid_post.1, resid_post.2, …, mlp_out.2, logits"
    )
    assert repr(llama.sites("embed")) == "1 site: embed"
    assert len(chosen[1:]) == 3
    assert chosen[0] == hk.Site("z", 0, 1)


def test_a_bare_name_means_every_layer(lm):
    assert list(lm.expand("resid_post")) == [hk.Site("resid_post", layer) for layer in range(3)]
    run = hk.forward(lm, "Tea", hk.capture("resid_post"))
    assert list(run.sites) == list(lm.sites("resid_post"))


def test_all_sites_of_a_model_can_be_selected(lm):
    every = lm.sites()
    assert {site.name for site in every} == set(lm.family.locations)
    assert all(site.layer is not None for site in lm.sites(layers=[1]))


def test_an_empty_selection_is_refused(llama):
    for empty in (
        lambda: as_sites([]),
        lambda: llama.sites("z", layers=[]),
        lambda: llama.sites("z", heads=[]),
        lambda: hk.capture([]),
    ):
        with pytest.raises(EmptySelection, match="name at least one"):
            empty()


def test_a_site_named_twice_in_one_hook_is_refused():
    with pytest.raises(BadHook, match=r"z\.1 is named twice in one hook"):
        hk.scale(["z.1", "z.1"], 2.0)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (
            lambda lm: lm.sites("resid_post", layers=[3]),
            OutOfRange,
            r"resid_post\.3 was asked for, and the model has 3 layers: 0 to 2",
        ),
        (
            lambda lm: lm.sites("z.1", heads=[4]),
            OutOfRange,
            r"z\.1\.4 was asked for, and 'z' has 4 heads: 0 to 3",
        ),
        (lambda lm: lm.sites("k.1", heads=[2]), OutOfRange, r"'k' has 2 key-value heads: 0 to 1"),
        (
            lambda lm: lm.sites("resid_post.1", layers=[2]),
            BadHook,
            r"layers= does not apply to resid_post\.1: leave layers= out",
        ),
        (
            lambda lm: lm.sites("z.1.0", heads=[2]),
            BadHook,
            r"heads= does not apply to z\.1\.0: leave heads= out",
        ),
        (lambda lm: lm.sites("pos_embed"), MissingSite, "has no 'pos_embed': positions are rotary"),
        (
            lambda lm: lm.sites("router_logits"),
            MissingSite,
            "has no 'router_logits': the MLP is one network, without a router",
        ),
        (
            lambda lm: lm.sites("z", layer=3),
            UnknownKeyword,
            r"sites\(\) has no keyword 'layer'; did you mean 'layers'",
        ),
        (
            lambda lm: lm.submodule("model.layer.1"),
            UnknownSite,
            "no module 'model.layer.1'; did you mean 'model.layers.1'",
        ),
    ],
)
def test_a_place_that_this_model_lacks_is_refused_in_words(llama, ask, error, words):
    with pytest.raises(error, match=words):
        ask(llama)


def test_describe_tells_every_site_with_sizes_and_why_one_is_missing(llama, gpt2):
    table = llama.describe().set_index("site")
    assert list(table.index) == [name for name in AXES if name not in CROSS_SITES]
    assert list(table.columns) == [
        "axes",
        "sizes",
        "layers",
        "module",
        "side",
        "editable",
        "missing",
    ]
    assert table.loc["k", "sizes"] == "batch pos 2 8"
    assert table.loc["mlp_post", "sizes"] == "batch pos 48"
    assert table.loc["logits", ["sizes", "module", "layers"]].tolist() == [
        "batch pos 320",
        "(the model)",
        1,
    ]
    assert "rotary" in table.loc["pos_embed", "missing"]
    assert not table.loc["pos_embed", "editable"]
    assert (table["missing"] == "").sum() == table["editable"].sum() == 21
    assert gpt2.describe().set_index("site").loc["mlp_pre", "sizes"] == "batch pos 128"
