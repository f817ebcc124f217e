"""Models larger than a device: whatever is asked of a model whose weights are on the disk is what the same model says
in memory, nothing is left on it, and no more than a part of it is ever in memory."""

import importlib.util
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import PROMPTS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hookkit as hk
from hookkit.errors import BadHook, Unsupported
from hookkit.hooks.values import convert_once
from hookkit.models.devices import describe_storages
from hookkit.models.provenance import about_model, weights_hash

ALL = {"": "disk"}
SOME = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
MODELS = {"llama": SOME, "gpt2": ALL, "gemma2": ALL, "mixtral": ALL}
CLEAN, CORRUPTED = [[5, 6, 7, 8], [9, 10, 11, 12]], [[5, 6, 7, 9], [9, 10, 11, 13]]
METRIC = hk.metrics.logit_diff(40, 50)
QUIET = {"progress": False}
GREEDY = {"max_new_tokens": 3, "do_sample": False}
VECTOR = torch.linspace(-1, 1, 32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    made = {}
    for kind in MODELS:
        made[kind] = tmp_path_factory.mktemp(kind)
        hk.tiny(kind).model.save_pretrained(made[kind])
        small_tokenizer.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module", params=MODELS)
def pair(request, folders, tmp_path_factory) -> tuple[hk.LM, hk.LM]:
    """A model whose weights are on the disk, and the same in memory."""
    folder, place = folders[request.param], MODELS[request.param]
    weights = tmp_path_factory.mktemp("weights")
    return hk.load(folder, device_map=place, offload_folder=weights), hk.load(folder, device="cpu")


@pytest.fixture
def llama(folders) -> hk.LM:
    """A llama of its own, of which two blocks and the head are on the disk."""
    return hk.load(folders["llama"], device_map=SOME)


def last(lm: hk.LM) -> str:
    return f"resid_post.{lm.n_layers - 1}"


def learnt(lens):
    return [lens.history, *lens.change.values(), *lens.offset.values()]


def kept(run):
    return [run.tokens, run.logits, *(run[site] for site in run.sites)]


def gradient_of_a_capture(lm):
    run = hk.forward(lm, PROMPTS, hk.capture("resid_post.0", grad=True))
    run.logits.square().sum().backward()
    found = run["resid_post.0"].grad
    lm.model.zero_grad(set_to_none=True)
    return found


ASKED = {
    "forward": lambda lm: kept(hk.forward(lm, PROMPTS, hk.capture(lm.sites(layers=[0, 1, 2])))),
    "generate": lambda lm: kept(
        hk.generate(lm, PROMPTS, hk.capture("z"), hk.steer("resid_post.0", VECTOR), **GREEDY)
    ),
    "edits": lambda lm: kept(
        hk.forward(lm, PROMPTS, hk.skip_block(1), hk.project_out(last(lm), VECTOR))
    ),
    "attach": lambda lm: attached(lm),
    "trace": lambda lm: hk.candidates(hk.generate(lm, PROMPTS[0], trace=hk.trace(), **GREEDY)),
    "compare": lambda lm: hk.compare_generations(lm, PROMPTS[0], hk.ban(40), **GREEDY).shifts,
    "stream": lambda lm: [str(now.text) for now in hk.stream(lm, PROMPTS[0], **GREEDY)],
    "surprisal": lambda lm: hk.surprisal(hk.forward(lm, PROMPTS)),
    "score": lambda lm: hk.token_losses(lm, PROMPTS, window=8),
    "logit_lens": lambda lm: hk.logit_lens(
        lm, PROMPTS, hk.scale("mlp_out.1", 2.0), pos=None, watch=[40]
    ),
    "train_lens": lambda lm: learnt(
        hk.train_lens(lm, [list(range(2, 90))], window=16, steps=2, **QUIET)
    ),
    "patchscope": lambda lm: hk.patchscope(
        lm, PROMPTS[0], target=PROMPTS[1], target_pos=-1, max_new_tokens=1
    ),
    "direct_logits": lambda lm: hk.direct_logits(hk.forward(lm, PROMPTS), 40, against=50),
    "direct_logits by heads": lambda lm: hk.direct_logits(hk.forward(lm, PROMPTS), 40, heads=True),
    "logit_terms": lambda lm: hk.logit_terms(hk.forward(lm, PROMPTS[0]), 40),
    "unembedding": lambda lm: hk.unembedding(lm, 40),
    "logit_path": lambda lm: hk.logit_path(lm, PROMPTS[0]),
    "gradients": lambda lm: hk.gradients(lm, PROMPTS, METRIC, ["resid_post", "z"]).of("z.0"),
    "gradient of a capture": gradient_of_a_capture,
    "attribution": lambda lm: hk.attribution(
        lm, CLEAN, CORRUPTED, "z", METRIC, method="integrated", steps=2
    ),
    "token_attribution": lambda lm: hk.token_attribution(lm, PROMPTS, METRIC),
    "mean_difference": lambda lm: (
        hk.mean_difference(lm, PROMPTS, ["we love"], "resid_post.1")[0].tensor
    ),
    "principal_direction": lambda lm: (
        hk.principal_direction(lm, PROMPTS, PROMPTS[::-1], "resid_post.1")[0].tensor
    ),
    "fit_vector": lambda lm: (
        hk.fit_vector(lm, PROMPTS, METRIC, "resid_post.0", steps=2, **QUIET).tensor
    ),
    "sweep": lambda lm: hk.sweep(
        lm, PROMPTS, {"layer": range(3)}, lambda layer: hk.ablate(f"z.{layer}"), METRIC, **QUIET
    ),
    "patching": lambda lm: hk.patching(lm, CLEAN, CORRUPTED, "resid_post", METRIC, **QUIET),
    "path_patching": lambda lm: hk.path_patching(
        lm, CLEAN, CORRUPTED, METRIC, layers=[0, 1], pos=[-1], **QUIET
    ),
    "causal_tracing": lambda lm: hk.causal_tracing(
        lm, ["I like tea"], "like", METRIC, samples=2, **QUIET
    ),
    "statistics": lambda lm: (
        hk.stats.activation_statistics(lm, PROMPTS, "resid_post", covariance=True, **QUIET)[
            last(lm)
        ].covariance
    ),
    "weights_hash": weights_hash,
}
ONE_SUM = {
    "edge_attribution": lambda lm: hk.edge_attribution(lm, CLEAN, CORRUPTED, METRIC)
}  # of some families only


def attached(lm):
    with hk.attach(lm, hk.capture("resid_post"), hk.steer("resid_post.1", VECTOR)) as manager:
        logits = lm.model(torch.tensor([[5, 6, 7]])).logits.detach()
    return [logits, manager["resid_post.2"]]


def same(found, expected) -> None:
    """Equal, floating numbers up to 1e-5 of the largest (files are mapped: their weights may be aligned otherwise)."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.shape == expected.shape
        if found.is_floating_point() and not torch.equal(found, expected):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    elif isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=3e-5)
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


def state(lm: hk.LM):
    """What may not change: the names of the weights that ask for gradients, and what every module carries."""
    asking = {
        name
        for name, weight in lm.model.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    carried = {path: sorted(vars(module)) for path, module in lm.model.named_modules()}
    hooks = {
        path: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for path, module in lm.model.named_modules()
    }
    return asking, carried, hooks, lm.places


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_of_a_model_on_the_disk_is_what_it_says_in_memory_and_nothing_is_left_on_it(
    pair, name
):
    offloaded, whole = pair
    assert any(weight.is_meta for weight in offloaded.model.parameters())
    before = state(offloaded)
    same(ASKED[name](offloaded), ASKED[name](whole))
    assert state(offloaded) == before


def test_edges_of_a_model_on_the_disk_are_those_of_the_model_in_memory(llama, folders):
    before = state(llama)
    ask = ONE_SUM["edge_attribution"]
    same(ask(llama), ask(hk.load(folders["llama"], device="cpu")))
    assert state(llama) == before


def test_sites_and_logits_are_those_of_plain_transformers_with_hooks_by_hand(llama, folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    seen = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _, __, output, number=number: seen.update({number: output})
        )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(ids).logits
    run = hk.forward(llama, ids.tolist(), hk.capture("resid_post"))
    assert torch.equal(run.logits, logits)
    for number, output in seen.items():
        assert torch.equal(
            run[f"resid_post.{number}"], output if isinstance(output, torch.Tensor) else output[0]
        )


def test_a_harvest_and_a_saved_sweep_of_a_model_on_the_disk_are_those_of_the_model_in_memory(
    llama, folders, tmp_path
):
    whole = hk.load(folders["llama"], device="cpu")
    made = [
        hk.harvest(lm, PROMPTS, ["resid_post", "z.1"], tmp_path / name, progress=False)
        for lm, name in ((llama, "disk"), (whole, "memory"))
    ]
    for site in made[1].sites:
        assert torch.equal(made[0][site][:], made[1][site][:])
    grid, at = {"layer": range(3)}, lambda layer: hk.ablate(f"mlp_out.{layer}")
    tables = [
        hk.sweep(lm, PROMPTS, grid, at, METRIC, save=tmp_path / "sweep", progress=False)
        for lm in (llama, whole)
    ]
    pd.testing.assert_frame_equal(
        *tables
    )  # the second goes on from the first's folder: the same model


def test_a_learning_model_learns_again_after_gradients_and_one_that_did_not_does_not(llama):
    llama.model.model.layers[1].requires_grad_(False)
    before = {name for name, weight in llama.model.named_parameters() if weight.requires_grad}
    assert before and not any(name.startswith("model.layers.1.") for name in before)
    hk.gradients(llama, PROMPTS, METRIC, "resid_post")
    hk.fit_vector(llama, PROMPTS, METRIC, "resid_post.0", steps=1, progress=False)
    assert {
        name for name, weight in llama.model.named_parameters() if weight.requires_grad
    } == before


def test_a_model_is_as_large_behind_a_forward_as_before_it(pair):
    offloaded, whole = pair
    hk.forward(offloaded, PROMPTS)
    assert about_model(offloaded)["parameters"] == about_model(whole)["parameters"]
    assert repr(offloaded) == repr(whole)


def test_captures_come_to_the_device_that_is_asked_for(llama):
    run = hk.forward(
        llama, PROMPTS, hk.capture("resid_post"), hk.capture("z.1", device="cpu", name="elsewhere")
    )
    assert run["resid_post.2"].device.type == "cpu"
    assert run["z.1", "elsewhere"].device.type == "cpu"


def test_a_vector_is_moved_once_and_not_in_every_forward():
    like, values = convert_once(VECTOR.double(), "vector"), torch.zeros(2, 32)
    first = like(values)
    assert first.dtype == torch.float32 and like(values + 1) is first
    with torch.inference_mode():
        inside = like(torch.zeros(2, 32, dtype=torch.bfloat16))
    assert not inside.is_inference()  # a later forward may need gradients


# ---- where it is


def test_the_table_of_sites_says_where_the_weights_are_of_a_model_that_is_spread(llama, folders):
    table = llama.describe().set_index("site")["place"]
    assert table["embed"] == "cpu" and table["final_norm"] == "cpu"
    assert table["lm_head"] == table["logits"] == "disk"
    assert table["resid_post"] == table["z"] == table["pattern"] == "cpu in 0, disk in 1-2"
    assert table["pos_embed"] == ""
    for place in ("cpu", ALL):  # in one place only
        options = {"device": place} if place == "cpu" else {"device_map": place}
        assert "place" not in hk.load(folders["llama"], **options).describe()


def test_a_checkup_says_where_the_weights_are(llama, folders):
    checkup = hk.doctor(llama, layers=[1])
    assert checkup.facts["device"] == "cpu, disk"
    assert checkup.sites.set_index("site").loc["z", "place"] == "cpu in 0, disk in 1-2"
    assert checkup.healthy and json.loads(checkup.to_json())["sites"][0]["place"] == "cpu"
    whole = hk.doctor(hk.load(folders["llama"], device="cpu"), layers=[1])
    assert whole.facts["device"] == "cpu" and "place" not in whole.sites


def test_blocks_are_told_in_runs():
    places = ["cuda:0", "cuda:0", "cuda:1", "cpu", "cpu", "disk"]
    assert (
        describe_storages(enumerate(places)) == "cuda:0 in 0-1, cuda:1 in 2, cpu in 3-4, disk in 5"
    )
    assert describe_storages(enumerate(["cpu"] * 3)) == "cpu"


def test_weights_that_accelerate_keeps_in_memory_are_told_from_those_on_the_disk():
    import accelerate

    model = accelerate.cpu_offload(hk.tiny("llama").model, execution_device=torch.device("cpu"))
    lm = hk.LM(model)
    assert all(weight.is_meta for weight in model.parameters()) and set(lm.places.values()) == {
        "cpu"
    }


# ---- loading


def test_memory_that_is_too_small_puts_the_rest_on_the_disk(folders, tmp_path):
    lm = hk.load(
        folders["mixtral"], device_map="auto", max_memory={"cpu": "200KB"}, offload_folder=tmp_path
    )
    assert set(lm.places.values()) == {"cpu", "disk"}
    ids = [[5, 6, 7]]
    assert torch.equal(hk.forward(lm, ids).logits, hk.forward(hk.tiny("mixtral"), ids).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "disk"}, r"say device_map=\{'': 'disk'\} for all of the model"),
        (
            {"device_map": "autp"},
            "'autp' is no device: say 'auto', or a device of this machine, which has",
        ),
        (
            {"device_map": {"": "cuda:97"}},
            r"device_map\[''\]='cuda:97' is not on this machine, which has .*cpu, disk",
        ),
        ({"device_map": {"": 97}}, r"device_map\[''\]=97 is not on this machine"),
        ({"device_map": {"": 1.5}}, "give a device"),
        ({"device_map": {}}, "places nothing"),
        (
            {"device_map": {"model.layer.0": "cpu", "": "cpu"}},
            "no such module; did you mean 'model.layers.0'",
        ),
        ({"device_map": "auto", "device": "cpu"}, "were both given: say one of them"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory=.* goes with a device_map"),
        ({"offload_folder": "there"}, "offload_folder='there' goes with a device_map"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}}, "already says where all is"),
        ({"device_map": "auto", "max_memory": "1GB"}, "give a mapping, such as"),
        (
            {"device_map": "auto", "max_memory": {"gpu": "1GB"}},
            "devices are the numbers of accelerators",
        ),
        (
            {"device_map": "auto", "max_memory": {"cpu": "1XB"}},
            "give bytes, or a text such as '20GB'",
        ),
        ({"device_map": "auto", "max_memory": {"cpu": -1}}, "give bytes, or a text such as '20GB'"),
        (
            {"device_map": "auto", "max_memory": {97: "1GB"}},
            r"max_memory\[97\]='1GB' is not on this machine",
        ),
        ({"device_map": "auto", "offload_folder": __file__}, "is a file: give a folder"),
    ],
    ids=str,
)
def test_a_placement_that_cannot_be_is_refused(folders, options, words):
    with pytest.raises(BadHook, match=words):
        hk.load(folders["llama"], **options)


def test_weights_that_cannot_be_read_where_they_are_ask_for_a_folder(folders):
    with pytest.raises(BadHook, match="say where they may be written, with offload_folder="):
        hk.load(folders["mixtral"], device_map=ALL)  # transformers joins the weights of experts


def test_without_accelerate_the_error_says_what_to_install(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "accelerate" else find(name, *more),
    )
    with pytest.raises(Unsupported, match="needs the package accelerate.*pip install accelerate"):
        hk.load(folders["llama"], device_map="auto")


# ---- memory

MEASURED = """
import gc, json, sys
from pathlib import Path
import torch
import hookkit as hk
from hookkit.models.provenance import weights_hash

torch.set_num_threads(1)


def resident(word: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(word))


def work(lm: hk.LM) -> None:
    run = hk.forward(lm, [list(range(5, 37))], hk.capture("resid_post"))
    assert len(run.sites) == lm.n_layers
    weights_hash(lm)


def peak(folder: str, place: dict) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    work(hk.load(folder, **place))
    return resident("VmHWM") - before


small, folder, *places = sys.argv[1:]
for place in ({"device": "cpu"}, {"device_map": {"": "disk"}}):
    peak(small, place)  # what the process needs for any model
print(json.dumps([peak(folder, json.loads(place)) for place in places]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, small_tokenizer):
    """A random model of 235 MB, and its size in bytes."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=128))
    model.save_pretrained(folder, max_shard_size="100MB")
    small_tokenizer.save_pretrained(folder)
    return folder, 4 * sum(weight.numel() for weight in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_with_three_quarters_of_the_layers_on_the_disk_memory_stays_under_half_of_the_model(
    large, folders
):
    folder, size = large
    place = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    place |= {f"model.layers.{number}": "cpu" if number < 2 else "disk" for number in range(8)}
    places = [json.dumps(each) for each in ({"device_map": place}, {"device": "cpu"})]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEASURED,
        str(folders["llama"]),
        str(folder),
        *places,
    ]
    # glibc's own threshold moves by chance; fixed, every tensor is given back at once
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    spread, whole = json.loads(done.stdout)
    assert whole > 0.9 * size, "the measure itself: in memory, all of the model is there"
    assert spread < 0.5 * size
