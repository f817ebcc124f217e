"""`save=`: a sweep that is killed or interrupted goes on where it was, and no other sweep goes on in its folder."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import filelock
import killing_sweeps
import pandas as pd
import pytest
import torch
from conftest import hooks_on

import hookkit as hk
from hookkit.errors import BadHook, Interrupted, Unsupported

PROMPTS = killing_sweeps.PROMPTS
METRIC = hk.metrics.logit_diff(5, 7)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two, and one thread gives the same bits in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> hk.LM:
    """A model that no test changes."""
    return hk.tiny("llama")


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """The sweep is slow only where it is to be killed."""
    monkeypatch.setattr(killing_sweeps.time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def undisturbed(small) -> pd.DataFrame:
    return killing_sweeps.swept(small)


def assert_to_the_bit(found: pd.DataFrame, wanted: pd.DataFrame):
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)
    assert found.attrs["complete"]


# ---- killed


def test_a_sweep_that_is_killed_at_any_moment_ends_with_the_same_table_to_the_bit(
    small, undisturbed, tmp_path
):
    code = "import sys, killing_sweeps; killing_sweeps.main(*sys.argv[1:])"
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "0", "5"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["killed"] >= 1 and report["seen"] == sorted(report["seen"]), (
        "nothing that was kept is lost"
    )
    assert max(report["seen"]) > 0, "it was killed in the middle"
    expected = (tmp_path / "undisturbed" / "table.csv").read_bytes()
    assert (tmp_path / "killed" / "table.csv").read_bytes() == expected
    assert_to_the_bit(
        killing_sweeps.swept(small, tmp_path / "killed"), undisturbed
    )  # in another process still

    stopped = report["interrupted"]
    assert (
        not stopped["complete"] and 0 < stopped["rows"] < len(undisturbed) and stopped["hooks"] == 0
    )
    assert stopped["files"] == ["cells.jsonl", "sweep.json"], (
        "no half-written file, no table, no lock"
    )
    (words,) = stopped["said"]
    assert (
        f"interrupted: {stopped['rows']} of {len(undisturbed)} cells are done; call it again to go on"
        in words
    )
    assert_to_the_bit(killing_sweeps.swept(small, tmp_path / "stopped"), undisturbed)
    assert (tmp_path / "stopped" / "table.csv").read_bytes() == expected


def test_a_last_line_that_was_cut_off_is_computed_again(small, undisturbed, tmp_path):
    killing_sweeps.swept(small, tmp_path)
    cells = tmp_path / "cells.jsonl"
    whole = cells.read_bytes()
    (tmp_path / "table.csv").unlink()
    for end in (len(whole) - 1, whole.rfind(b"\n", 0, -1) + 30, whole.find(b"\n") // 2, 0):
        cells.write_bytes(whole[:end])
        assert_to_the_bit(killing_sweeps.swept(small, tmp_path), undisturbed)
        assert cells.read_bytes() == whole, "the same lines again"


@pytest.mark.parametrize("kept", [slice(None, 1), slice(1, None)])
def test_a_forward_of_which_some_values_are_known_runs_for_the_others(
    small, undisturbed, tmp_path, kept
):
    killing_sweeps.swept(small, tmp_path)
    (tmp_path / "table.csv").unlink()
    cells = tmp_path / "cells.jsonl"
    lines = [json.loads(line) for line in cells.read_text().splitlines()]
    lines = [line for line in lines if isinstance(line, list)]  # the last one is the table's hash
    assert max(map(len, lines)) > 1, "a forward serves several cells"
    cells.write_text("".join(json.dumps(line[kept]) + "\n" for line in lines))
    table = killing_sweeps.swept(small, tmp_path)
    assert table.attrs["complete"] and len(table) == len(undisturbed)
    for name in ("logit_diff", "gap", "kl"):
        assert table[name].tolist() == pytest.approx(undisturbed[name].tolist(), abs=1e-5)


def test_what_is_kept_is_not_computed_again(small, tmp_path):
    calls = []

    def counted(values):
        calls.append(1)
        return values * 0.5

    def once():
        return hk.sweep(
            small,
            PROMPTS,
            {"layer": range(3)},
            lambda layer: hk.edit(hk.Site("z", layer), counted),
            METRIC,
            save=tmp_path,
        )

    first, count = once(), len(calls)
    pd.testing.assert_frame_equal(once(), first, check_exact=True)
    assert len(calls) == count > 0
    assert pd.read_csv(tmp_path / "table.csv").to_numpy() == pytest.approx(first.to_numpy(float))


def test_values_that_were_kept_with_another_memory_stay_as_they_are(small, undisturbed, tmp_path):
    with pytest.warns(Interrupted):
        part = stopping(small, tmp_path, after=12, memory=300_000)
    table = killing_sweeps.swept(small, tmp_path, memory=10**9)
    both = table.merge(part, on=["site", "layer", "pos", "by", "row"], suffixes=("", "_part"))
    assert len(both) == len(part) > 0 and (both["logit_diff"] == both["logit_diff_part"]).all()
    for name in ("logit_diff", "gap", "kl"):  # the rest up to rounding
        assert table[name].tolist() == pytest.approx(undisturbed[name].tolist(), abs=1e-4)


# ---- interrupted


def stopping(lm, folder, *, after: int, **settings) -> pd.DataFrame:
    """The sweep with a Ctrl-C in the function of an edit, after so many calls."""
    count = 0
    real = killing_sweeps.time.sleep

    def sleep(seconds):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt

    killing_sweeps.time.sleep = sleep
    try:
        return killing_sweeps.swept(lm, folder, **settings)
    finally:
        killing_sweeps.time.sleep = real


def test_ctrl_c_gives_what_is_done_with_a_warning_and_the_sweep_goes_on_later(
    small, undisturbed, tmp_path
):
    before = hooks_on(small.model)
    done = [0]
    for after in (12, 0, 6, 0):
        with pytest.warns(
            Interrupted, match="the sweep was interrupted: .* call it again to go on"
        ) as caught:
            part = stopping(small, tmp_path, after=after)
        assert caught[0].filename == killing_sweeps.__file__, (
            "the warning is at the user's own line"
        )
        assert part.attrs["complete"] is False and len(part) >= done[-1]
        assert hooks_on(small.model) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.jsonl", "sweep.json"]
        assert (tmp_path / "cells.jsonl").read_bytes().endswith(b"\n")
        same = part.merge(undisturbed)
        assert len(same) == len(part), "each row that is done is the row of the whole table"
        done.append(len(part))
    assert 0 < done[1] < done[3] < len(undisturbed)
    assert_to_the_bit(killing_sweeps.swept(small, tmp_path), undisturbed)


def test_ctrl_c_without_a_folder_gives_what_is_done_too(small, undisturbed):
    with pytest.warns(Interrupted, match="with save= it could go on from there"):
        part = stopping(small, None, after=12)
    assert 0 < len(part) < len(undisturbed) and list(part.columns) == list(undisturbed.columns)
    with pytest.warns(Interrupted, match=f"interrupted: 0 of {len(undisturbed)} cells"):
        none = stopping(small, None, after=0)
    assert list(none.columns) == list(undisturbed.columns) and len(none) == 0
    torch.testing.assert_close(
        small.model(torch.tensor(PROMPTS[:1])).logits,
        hk.tiny("llama").model(torch.tensor(PROMPTS[:1])).logits,
    )


# ---- whose folder it is


def halved(values):
    return values * 0.5


def thirded(values):
    return values / 3


def loud(logits):
    return logits[:, 5]


def louder(logits):
    return logits[:, 5] + logits[:, 7]


def times(factor):
    return lambda layer: hk.edit(hk.Site("z", layer), lambda values: values * factor)


GIVEN = {
    "prompts": PROMPTS,
    "grid": {"layer": range(3)},
    "hooks": lambda layer: hk.edit(hk.Site("z", layer), halved, pos=-2),
    "metrics": [METRIC, loud],
    "pos": -1,
}


def ran(lm, folder, **changes):
    given = GIVEN | changes
    first = [given.pop(name) for name in ("prompts", "grid", "hooks", "metrics")]
    return hk.sweep(lm, *first, save=folder, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": [PROMPTS[0], PROMPTS[1], PROMPTS[2][::-1]]}, "prompts"),
        ({"prompts": [*PROMPTS, [3, 4, 5]]}, "prompts"),
        ({"grid": {"layer": range(2)}}, "cells"),
        (
            {
                "grid": {"block": range(3)},
                "hooks": lambda block: hk.edit(hk.Site("z", block), halved, pos=-2),
            },
            "cells",
        ),
        ({"hooks": lambda layer: hk.edit(hk.Site("z", layer), halved, pos=-3)}, "cells"),
        ({"hooks": lambda layer: hk.edit(hk.Site("z", layer), thirded, pos=-2)}, "cells"),
        (
            {
                "hooks": lambda layer: hk.edit(
                    hk.Site("z", layer), lambda values: values * 0.5, pos=-2
                )
            },
            "cells",
        ),
        ({"metrics": METRIC}, "metrics"),
        ({"metrics": [hk.metrics.logit_diff(5, 8), loud]}, "metrics"),
        ({"metrics": [METRIC, louder]}, "metrics"),
        ({"pos": -2}, "pos"),
        ({"base_hooks": [hk.ablate("z.0.1")]}, "base_hooks"),
        ({"control": "random"}, "cells"),
    ],
)
def test_the_folder_of_another_sweep_is_refused(small, tmp_path, change, words):
    first = ran(small, tmp_path)
    kept = (tmp_path / "cells.jsonl").read_bytes()
    with pytest.raises(
        BadHook,
        match=f"holds another sweep: it differs in {words}. Give this one a folder of its own",
    ):
        ran(small, tmp_path, **change)
    assert (tmp_path / "cells.jsonl").read_bytes() == kept
    pd.testing.assert_frame_equal(ran(small, tmp_path), first, check_exact=True)


def test_a_function_with_the_same_source_and_another_number_is_another_sweep(small, tmp_path):
    ran(small, tmp_path, hooks=times(0.5))
    ran(small, tmp_path, hooks=times(0.5))
    with pytest.raises(BadHook, match="it differs in cells"):
        ran(small, tmp_path, hooks=times(0.25))


def test_a_prompt_that_goes_on_behind_the_metrics_position_is_another_prompt(small, tmp_path):
    ran(
        small,
        tmp_path,
        prompts=[[5, 6, 7, 8]],
        pos=1,
        hooks=lambda layer: hk.ablate(hk.Site("z", layer), pos=-3),
    )
    with pytest.raises(BadHook, match="it differs in prompts"):
        ran(
            small,
            tmp_path,
            prompts=[[5, 6, 7]],
            pos=1,
            hooks=lambda layer: hk.ablate(hk.Site("z", layer), pos=-3),
        )


def test_the_numbers_of_a_reference_run_are_part_of_the_sweep(small, tmp_path):
    plain, edited = hk.forward(small, PROMPTS), hk.forward(small, PROMPTS, hk.ablate("mlp_out.1"))
    ran(small, tmp_path, metrics=hk.metrics.kl(plain))
    ran(small, tmp_path, metrics=hk.metrics.kl(hk.forward(small, PROMPTS)))
    for other in (hk.metrics.kl(edited), hk.metrics.kl(plain, pos=-2), hk.metrics.kl()):
        with pytest.raises(BadHook, match="it differs in metrics"):
            ran(small, tmp_path, metrics=other)


def test_a_patch_from_another_run_is_another_sweep(small, tmp_path):
    def patches(*hooks):
        source = hk.forward(small, PROMPTS[::-1][:1], *hooks, hk.capture("z"))
        return lambda layer: hk.patch(hk.Site("z", layer), source, pos=0)

    ran(small, tmp_path, hooks=patches())
    ran(small, tmp_path, hooks=patches())
    with pytest.raises(BadHook, match="it differs in cells"):
        ran(small, tmp_path, hooks=patches(hk.scale("embed", 2.0)))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.data.add_(1e-3),
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    ],
)
def test_the_folder_of_another_model_is_refused(tmp_path, change):
    ran(hk.tiny("llama"), tmp_path)
    model = hk.tiny("llama").model
    change(model)
    with pytest.raises(BadHook, match="it differs in model"):
        ran(hk.LM(model, name="tiny llama"), tmp_path)


def test_the_same_weights_under_another_name_are_the_same_model(tmp_path):
    ran(hk.tiny("llama"), tmp_path)
    ran(hk.LM(hk.tiny("llama").model, name="moved"), tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["name"] == ["tiny llama", None]


def test_adapters_that_are_switched_off_make_another_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(hk.tiny("llama").model, config).eval()
    lm = hk.LM(model)
    ran(lm, tmp_path)
    with model.disable_adapter(), pytest.raises(BadHook, match="it differs in model"):
        ran(lm, tmp_path)
    ran(lm, tmp_path)


def test_a_dimension_of_functions_is_the_same_in_another_process(small, tmp_path):
    def once(*functions):
        hooks = lambda do: hk.edit("z.1", lambda values: do(values))  # noqa: E731
        ran(small, tmp_path, grid={"do": list(functions)}, hooks=hooks)

    def another():
        def doubled(values):
            return values * 2

        return doubled

    first, again = another(), another()
    assert repr(first) != repr(again)  # as in another process
    once(first)
    once(again)


def test_two_sweeps_at_once_in_one_folder_are_refused(small, tmp_path):
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(Unsupported, match="another process is running the sweep"),
    ):
        ran(small, tmp_path)
    ran(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cells.jsonl",
        "sweep.json",
        "table.csv",
    ]


def test_a_random_control_is_kept_too(small, tmp_path):
    first = ran(small, tmp_path, control="random")
    pd.testing.assert_frame_equal(ran(small, tmp_path, control="random"), first, check_exact=True)
    assert pd.read_csv(tmp_path / "table.csv")["control"].sum() == 9 * 10


# ---- progress


def test_progress_is_silent_or_shown(small, tmp_path, capfd):
    for progress in (None, False):  # there is no terminal here
        ran(small, None, progress=progress)
        assert capfd.readouterr() == ("", "")
    ran(small, None, progress=True)
    assert "9/9" in capfd.readouterr().err
    with pytest.warns(Interrupted):
        stopping(small, tmp_path, after=12, progress=True)
    assert "72/72" not in capfd.readouterr().err
    killing_sweeps.swept(small, tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "72/72" in shown and "73/72" not in shown, "what was done before is counted once"
    ran(small, tmp_path / "whole")
    ran(small, tmp_path / "whole", progress=True)
    assert "9/9" in capfd.readouterr().err
