"""Trials are kept on disk: a second process makes none, and another model, or a damaged file, means a new one."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

import hookkit as hk
from hookkit.sweeps import kept_trials, shortcuts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, in which small models count as large ones."""
    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_trials, "MIN_PARAMETERS", 0)
    return tmp_path / "trials"


@pytest.fixture
def trials(monkeypatch):
    """The models that were tried, in order."""
    tried, trial = [], shortcuts._try_shortcuts
    monkeypatch.setattr(
        shortcuts, "_try_shortcuts", lambda lm, *a, **k: tried.append(lm) or trial(lm, *a, **k)
    )
    return tried


def swept(lm):
    """A sweep of one prompt, whose values say whether its shortcuts hold."""

    def hooks(layer):
        return hk.ablate(hk.Site("attn_out", layer))

    grid = {"layer": range(lm.n_layers)}
    return hk.sweep(lm, [range(5, 13)], grid, hooks, hk.metrics.logit(7), verify=2)["logit"]


def fresh(kind="llama", seed=0, **config):
    torch.manual_seed(seed)
    return hk.tiny(kind, config=config)


PROGRAM = """
import sys
import hookkit as hk
from hookkit.sweeps import kept_trials
kept_trials.MIN_PARAMETERS = 0
lm, calls = hk.tiny("llama"), []
inner = type(lm.model.model).forward
def counted(*args, **kwargs):
    calls.append(1)
    return inner(*args, **kwargs)
counted.__code__ = counted.__code__.replace(co_filename=inner.__code__.co_filename)
type(lm.model.model).forward = counted
hooks = lambda layer: hk.ablate(hk.Site("attn_out", layer))
for _ in range(2):
    calls.clear()
    table = hk.sweep(lm, [range(5, 13)], {"layer": [0, 1]}, hooks, hk.metrics.logit(7))
    print(len(calls), table["logit"].tolist())
"""


def test_a_second_process_makes_no_trial(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HOOKKIT_CACHE": str(tmp_path)},
        )
        first, later = done.stdout.splitlines()
        return first.partition(" ")[::2], later.partition(" ")[::2]

    (tried, values), (later, _) = run()
    (in_second_process, same_values), _ = run()
    assert int(tried) > int(later) == int(in_second_process)
    assert values == same_values


def test_another_lm_of_an_equal_model_reads_the_trial(folder, trials):
    values = [swept(fresh()).tolist() for _ in range(2)]
    assert values[0] == values[1] and len(trials) == 1
    known, read = (hk.LM(fresh().model) for _ in range(2))
    known.trial_results.update(trials[0].trial_results)
    rows = [range(8)]
    one, two = shortcuts.shortcuts(known, rows), shortcuts.shortcuts(read, rows)
    assert {**vars(one), "kinds": [*one.kinds]} == {**vars(two), "kinds": [*two.kinds]}
    assert two.grow and two.prefix and two.last and two.tokens and two.factors


def _small_change(lm):
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def _scaling(lm):
    lm.model.model.layers[1].self_attn.scaling *= 2


@pytest.mark.parametrize(
    "change",
    [
        _small_change,
        _scaling,
        lambda lm: setattr(lm.model.config, "rope_theta", 5.0),
        lambda lm: lm.model.set_attn_implementation("eager"),
        lambda lm: lm.model.double(),
        lambda lm: lm.model.model.layers[1].mlp.train(),
    ],
    ids=["a weight", "a number of a module", "config", "attention", "dtype", "one module trains"],
)
def test_a_model_that_differs_in_anything_is_tried_again(folder, trials, change):
    swept(fresh())
    changed = fresh()
    change(changed)
    swept(changed)
    assert len(trials) == len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("what", ["versions", "_hash_of_hookkit", "_hash_of_source"])
def test_other_code_means_a_new_trial(folder, trials, monkeypatch, what):
    swept(fresh())
    monkeypatch.setattr(kept_trials, what, lambda *_: "another")
    swept(fresh())
    assert len(trials) == 2


def _own_forward(lm):
    mlp = lm.model.model.layers[0].mlp
    mlp.forward = mlp.forward


class OwnMLP(torch.nn.Module):
    """A class that is not transformers' own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden)


def _own_class(lm):
    lm.model.model.layers[0].mlp = OwnMLP(lm.model.model.layers[0].mlp)


def _hook(lm):
    def hook(module, args):
        return None

    hook.__module__ = "accelerate.hooks"  # a library's, with which a sweep runs its shortcuts
    lm.model.model.layers[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("change", [_own_forward, _own_class, _hook])
def test_a_model_that_somebody_changed_is_tried_in_each_process(folder, trials, change):
    for _ in range(2):
        lm = fresh()
        change(lm)
        swept(lm)
    assert len(trials) == 2 and not folder.exists()


def test_replaced_code_of_a_class_or_its_file_is_seen(folder, trials, monkeypatch):
    modeling = sys.modules[type(fresh().model).__module__]
    rotate, norm = modeling.rotate_half, modeling.LlamaRMSNorm.forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "rotate_half", lambda values: rotate(values))
        swept(fresh())
    with monkeypatch.context() as patch:
        patch.setattr(modeling.LlamaRMSNorm, "forward", lambda self, values: norm(self, values))
        swept(fresh())
    assert len(trials) == 2 and not folder.exists()


def test_small_models_are_not_kept(folder, trials, monkeypatch):
    monkeypatch.setattr(kept_trials, "MIN_PARAMETERS", 10_000_000)
    swept(fresh())
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "other value", "foreign", "no text", "a folder"])
def test_a_damaged_or_foreign_file_means_a_new_trial_and_is_replaced(folder, trials, damage):
    values = swept(fresh()).tolist()
    (path,) = folder.iterdir()
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "other value":
        path.write_text(text.replace('"reads_ahead": false', '"reads_ahead": true'))
    elif damage == "foreign":
        path.write_text(json.dumps([text]))
    elif damage == "no text":
        path.write_bytes(b"\xff\xfe\x00")
    else:
        path.unlink()
        path.mkdir()
    assert swept(fresh()).tolist() == values and len(trials) == 2
    assert swept(fresh()).tolist() == values
    assert len(trials) == (3 if damage == "a folder" else 2)  # a folder is not hookkit's to remove


def test_a_cache_that_cannot_be_written_changes_nothing(folder, trials):
    folder.write_text("a file where a folder is needed")
    swept(fresh())
    assert len(trials) == 1 and folder.is_file()


def test_many_writers_leave_a_whole_file(folder):
    path = folder / "model.json"

    def write(number):
        for _ in range(20):
            kept_trials.add_result(path, f"trial {number}", [number] * 2000)
            with suppress(KeyError):
                assert kept_trials.read_results(path)[f"trial {number}"] == [number] * 2000
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))
    results = kept_trials.read_results(path)
    assert results and all(value == [int(name[6:])] * 2000 for name, value in results.items())
    assert [file.name for file in folder.iterdir()] == ["model.json"]


def test_the_oldest_files_are_removed(folder, monkeypatch):
    monkeypatch.setattr(kept_trials, "MAX_FILES", 3)
    for number in range(5):
        kept_trials.add_result(folder / f"{number}.json", "name", number)
    assert len(list(folder.iterdir())) == 3 and (folder / "4.json").exists()
