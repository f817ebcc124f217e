"""`engine="ray"`: the files and tables of one process, byte for byte, whatever becomes of the actors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import killing
import killing_ray
import killing_sweeps
import pandas as pd
import psutil
import pytest
import torch
from conftest import tiny
from dictionaries import write

import hookkit as hk
from hookkit.errors import ActorLost, BadHook, OtherModel, Unsupported
from hookkit.runs.engines import actors as travelling
from hookkit.runs.engines.actors import Crew, Member, Step, Task

ray = pytest.importorskip("ray")

HERE = Path(__file__).parents[1]
SEEN = os.pathsep.join(
    [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
)  # by Ray's processes


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As an actor of one CPU has, so that it computes the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster():
    """A Ray that the program has initialised, with room for four actors of one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SEEN)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def small() -> hk.LM:
    return hk.tiny("llama")


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Path:
    """A harvest of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    harvest(small, folder)
    return folder


@pytest.fixture(scope="module")
def table(small) -> pd.DataFrame:
    """A sweep of one process."""
    return killing_sweeps.swept(small)


def harvest(lm, folder, given=None, **changes):
    given = iter(killing.texts()) if given is None else given
    return hk.harvest(lm, given, killing.SITES, folder, **(killing.SETTINGS | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_once(found: hk.types.Harvest) -> bool:
    """True where every token of every text is there once, in order."""
    wanted = [
        (text, pos, token)
        for text, ids in enumerate(killing.texts())
        for pos, token in enumerate(ids)
    ]
    return (
        list(zip(*(found[name][:].tolist() for name in ("text", "pos", "token")), strict=True))
        == wanted
    )


def child(*words: str, code: str = "", **given) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else [killing_ray.__file__]
    env = os.environ | {"PYTHONPATH": SEEN}
    return subprocess.run(
        [sys.executable, *start, *words],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=300,
        **given,
    )


# ---- the same, byte for byte

SOME_ACTORS = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("actors", SOME_ACTORS)
def test_a_harvest_on_actors_is_that_of_one_process_byte_for_byte(
    cluster, small, undisturbed, tmp_path, actors
):
    found = harvest(
        small, tmp_path / "a", engine="ray" if actors == 4 else hk.Ray(actors=actors)
    )  # which is four
    assert files(tmp_path / "a") == files(undisturbed) and rows_once(found)
    assert ray.is_initialized()  # what the program initialised is its own to end


def test_features_of_a_dictionary_on_actors_are_those_of_one_process(cluster, small, tmp_path):
    dictionary = hk.load_dictionary(write(tmp_path / "sae", "topk"))
    own = small.with_dictionaries(dictionary, check=False)
    sites = ["feat.resid_post.1", "feat.resid_post.1.7", "resid_post.1"]
    for name, engine in (("here", None), ("there", hk.Ray(actors=2))):
        texts = killing.texts()[:60]
        hk.harvest(
            own, texts, sites, tmp_path / name, batch_tokens=64, engine=engine, progress=False
        )
    assert files(tmp_path / "there") == files(tmp_path / "here")

    def hooks(feature: int, by: float):
        return hk.scale(f"feat.resid_post.1.{feature}", by)

    grid = {"feature": [3, 7, 30, 90], "by": [0.0, 2.0]}
    prompts = killing_sweeps.PROMPTS
    here, there = (
        hk.sweep(own, prompts, grid, hooks, hk.metrics.logit(5), engine=engine, progress=False)
        for engine in (None, hk.Ray(actors=2))
    )
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert (here["logit_delta"] != 0).any()


@pytest.mark.parametrize("kind", ["steer", "model"])
def test_token_shifts_on_actors_are_those_of_one_process_to_the_bit(cluster, small, kind):
    change = hk.steer("resid_post.1", torch.ones(32))
    if kind == "model":
        change = hk.tiny("llama", seed=1)
    settings = {"long": "split", "context": 16, "batch_tokens": 64, "progress": False, "every": 2}
    here = hk.token_shifts(small, killing.texts(), change, controls=3, **settings)
    there = hk.token_shifts(small, killing.texts(), change, controls=3, engine="ray", **settings)
    pd.testing.assert_frame_equal(here.table, there.table, check_exact=True)
    pd.testing.assert_frame_equal(here.examples, there.examples, check_exact=True)


@pytest.mark.parametrize("actors", SOME_ACTORS)
def test_a_sweep_on_actors_is_that_of_one_process_to_the_bit(
    cluster, small, table, tmp_path, actors
):
    found = killing_sweeps.swept(small, tmp_path / "ray", engine=hk.Ray(actors=actors))
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert found.attrs == table.attrs
    if actors == 2:
        killing_sweeps.swept(small, tmp_path / "here")
        assert files(tmp_path / "ray") == files(
            tmp_path / "here"
        )  # the journal has its lines in the same order


def test_a_standard_grid_passes_its_engine_on_with_its_sources_and_cells_that_run_alone(
    cluster, gpt2
):
    clean, corrupted = "Mary gave tea to John", "John gave tea to Mary"
    given = {
        "pos": [-1, -2],
        "control": "random",
        "base_hooks": hk.scale("mlp_out.0", 0.5),
        "progress": False,
    }
    words = [gpt2, clean, corrupted, "resid_pre", [hk.metrics.logit_diff(5, 7), hk.metrics.kl()]]
    here, there = (
        hk.patching(*words, **given, engine=engine) for engine in (None, hk.Ray(actors=1))
    )
    pd.testing.assert_frame_equal(there, here, check_exact=True)


def test_what_is_kept_in_another_dtype_or_left_out_is_so_on_actors_too(cluster, gpt2, tmp_path):
    words = [gpt2, ["Tea with milk", "T", "I like oat milk in my"], "mlp_post"]
    given = {"pos": slice(1, None), "dtype": "bfloat16", "on_error": "skip", "progress": False}
    for folder, engine in (("here", None), ("there", hk.Ray(actors=1))):
        hk.harvest(*words, tmp_path / folder, **given, engine=engine)
    assert files(tmp_path / "there") == files(tmp_path / "here")


# ---- actors that are killed


def actors() -> list[psutil.Process]:
    """The processes of actors that run on this machine."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        if each.info["cmdline"] and each.info["cmdline"][0].startswith("ray::Actor"):
            found.append(each)
    return found


def test_actors_killed_while_they_harvest_lose_no_row_and_double_none(
    cluster, small, undisturbed, tmp_path
):
    drawn, killed = random.Random(0), set()
    due = {30: 1, 60: 2}  # how many are to be killed, from which text on

    def given():
        left = 0
        for number, ids in enumerate(killing.texts()):
            left += due.get(
                number, 0
            )  # one that is not there yet is killed before a later text: it cannot come if
            while left and (
                there := [each for each in actors() if each.pid not in killed]
            ):  # this one waits for it
                chosen = drawn.choice(there)
                chosen.kill()
                killed.add(chosen.pid)
                left -= 1
            yield ids

    found = harvest(small, tmp_path / "a", given(), engine=hk.Ray(actors=2))
    assert len(killed) == 3
    assert files(tmp_path / "a") == files(undisturbed) and rows_once(found)


def deadly(mark: Path, values: torch.Tensor) -> torch.Tensor:
    """An edit whose process is killed as long as there is a mark. Each death takes one away."""
    if left := sorted(mark.glob("*")):
        left[0].unlink()
        time.sleep(0.5)  # the result of the unit before it leaves the process
        os.kill(os.getpid(), signal.SIGKILL)
    return values * 0.5


def test_actors_killed_while_they_sweep_lose_no_cell_double_none_and_blame_no_other(
    cluster, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "hookkit.runs.engines.actors.LOSSES", 1
    )  # units that wait behind one that kills do not count
    marks = tmp_path / "marks"

    def swept(**settings):
        grid = {"layer": range(3), "pos": [-3, -2, -1], "by": [1, 2]}
        edits = lambda layer, pos, by: [  # noqa: E731
            hk.edit(
                hk.Site("z", layer),
                lambda values: deadly(marks / f"{layer} {pos} {by}", values),
                pos=pos,
            ),
            hk.scale(hk.Site("resid_pre", layer), by, pos=pos),
        ]
        settings |= {"memory": 1, "progress": False}  # so little that each cell is a unit
        return hk.sweep(
            small, killing_sweeps.PROMPTS, grid, edits, hk.metrics.logit_diff(5, 7), **settings
        )

    here = swept()
    for cell in ("0 -3 1", "0 -3 2", "2 -1 2"):
        (marks / cell).mkdir(parents=True)
        (marks / cell / "once").touch()
    there = swept(engine=hk.Ray(actors=2), save=tmp_path / "sweep")
    assert not [*marks.glob("*/*")]  # every death was died
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    lines = (tmp_path / "sweep" / "cells.jsonl").read_text().splitlines()
    keys = [tuple(found[:2]) for line in lines for found in json.loads(line)]
    assert len(keys) == len(set(keys))


def test_a_result_that_had_come_is_taken_from_an_actor_that_died(cluster, small):
    actor = ray.remote(Crew).remote(None, None, None)  # any class that Ray can hold
    ray.kill(actor)
    lost = actor.run.remote([])
    ray.wait([lost])
    first, second, other = (Task(Step(name, print), done=False) for name in "abc")
    member, neighbour = Member(actor, tasks=[first, second]), Member(None, tasks=[other])
    crew = Crew(hk.Ray(), small, None, members=[member, neighbour])
    come = [ray.put(travelling.pack_result(number)) for number in (5, 7)]
    crew._in_flight = {
        come[0]: (first, member),
        lost: (second, member),
        come[1]: (other, neighbour),
    }
    crew._take_finished(member)
    assert (first.done, first.result) == (True, 5) and member.tasks == [second]
    assert not second.done and not other.done
    assert set(crew._in_flight) == {lost, come[1]}


def test_work_that_kills_every_actor_is_named_and_given_up(cluster, small, monkeypatch):
    monkeypatch.setattr("hookkit.runs.engines.actors.LOSSES", 1)

    def kill(values):
        os.kill(os.getpid(), signal.SIGKILL)
        return values

    with pytest.raises(
        ActorLost, match="actors that computed the sweep's cell layer=1 died 2 times: is the memory"
    ):
        hk.sweep(
            small,
            [[1, 2, 3]],
            {"layer": [1]},
            lambda layer: hk.edit(hk.Site("z", layer), kill),
            hk.metrics.prob(5),
            engine=hk.Ray(actors=1),
        )


# ---- errors


class Sour(ValueError):
    """An error of the user's that is not made of one text."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} is sour: {number}")
        self.number = number


def test_a_users_error_keeps_its_type_names_its_cells_and_leaves_what_was_done(
    cluster, small, tmp_path
):
    def turn(layer: int, values):
        if layer == 2:
            raise Sour("milk", 7)
        return values * 2

    def swept(**settings):
        grid = {"layer": range(3), "site": ["z", "mlp_out"]}
        edits = lambda layer, site: hk.edit(hk.Site(site, layer), lambda v: turn(layer, v), pos=-1)  # noqa: E731
        settings |= {"memory": 1, "progress": False}
        return hk.sweep(small, killing_sweeps.PROMPTS, grid, edits, hk.metrics.prob(5), **settings)

    for folder, engine in (("here", None), ("there", hk.Ray(actors=1))):
        with pytest.raises(Sour, match="milk is sour: 7") as raised:
            swept(engine=engine, save=tmp_path / folder)
    assert raised.value.number == 7
    notes = "\n".join(raised.value.__notes__)
    assert "in the sweep's cell layer=2, site='z', on an actor of Ray" in notes and "line" in notes
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert (tmp_path / "there" / "cells.jsonl").read_bytes().count(b"\n") > 3


def test_an_error_of_one_batch_names_its_texts_and_the_shards_before_it_stay(cluster, tmp_path):
    lm = hk.LM(tiny("llama"))
    with torch.no_grad():
        lm.root.get_input_embeddings().weight[319] = 3e38
    given = [[token % 319 for token in ids] for ids in killing.texts()]
    given[100] = [1, 319, 2]
    for folder, engine in (("here", None), ("there", hk.Ray(actors=1))):
        with pytest.raises(BadHook, match="dtype='float16' holds numbers up to 65504") as raised:
            harvest(lm, tmp_path / folder, given, dtype="float16", engine=engine)
    assert (
        "in the batch of text" in raised.value.__notes__[0] and "100" in raised.value.__notes__[0]
    )
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert len(hk.open_harvest(tmp_path / "there")) > 100


def test_a_text_that_cannot_be_read_ends_a_harvest_behind_what_came_before_it(
    cluster, small, tmp_path
):
    given = killing.texts()
    given[100] = []
    for folder, engine in (("here", None), ("there", hk.Ray(actors=1))):
        with pytest.raises(hk.errors.BadPrompt, match="text 100 is empty"):
            harvest(small, tmp_path / folder, given, engine=engine)
    assert files(tmp_path / "there") == files(tmp_path / "here")


# ---- interrupted, and a node that is lost


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("interrupted")
    done = child("interrupted", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_ctrl_c_ends_what_hookkit_started_and_a_harvest_goes_on(
    interrupted, cluster, small, undisturbed, tmp_path
):
    folder, said = interrupted
    ended = {"interrupted": True, "started": True, "initialised": False, "left": []}
    assert {name: said["harvest"][name] for name in ended} == ended
    done = hk.open_harvest(folder / "harvest")
    assert not done.finished and 0 < len(done) < len(hk.open_harvest(undisturbed))
    shutil.copytree(folder / "harvest", tmp_path / "there")
    for where, engine in ((folder / "harvest", None), (tmp_path / "there", hk.Ray(actors=1))):
        harvest(small, where, engine=engine)
        assert files(where) == files(undisturbed)


def test_the_ray_that_hookkit_starts_listens_to_this_machine_alone_and_asks_for_a_token(
    interrupted,
):
    _, said = interrupted
    assert said["harvest"]["listens"] == ["127.0.0.1"]
    assert said["harvest"]["token"] == os.environ.get("RAY_AUTH_MODE", "token")


def test_a_ray_whose_clusters_have_no_token_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr("hookkit.runs.engines.ray.version", lambda name: "2.58.1")
    with pytest.raises(
        hk.errors.MissingExtra,
        match=r"needs ray>=2.59, and 2.58 is installed.*pip install --upgrade",
    ):
        harvest(small, tmp_path / "a", engine="ray")
    assert not (tmp_path / "a").exists()


def test_ctrl_c_ends_what_hookkit_started_and_a_sweep_goes_on(interrupted, small, table):
    folder, said = interrupted
    assert 0 < said["sweep"].pop("rows") < len(table)
    assert said["sweep"] == {"interrupted": True, "started": True, "initialised": False, "left": []}
    found = killing_sweeps.swept(small, folder / "sweep")
    pd.testing.assert_frame_equal(found, table, check_exact=True)


def test_a_node_that_is_lost_in_the_middle_changes_nothing(undisturbed, tmp_path):
    done = child("cluster", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "before": [2],
        "after": 1,
        "initialised": False,
    }
    assert files(tmp_path / "cluster") == files(undisturbed)


# ---- what travels


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_arrives_with_its_own_weights_tied_as_they_were_and_uncopied(family):
    lm = hk.tiny(family, config={"tie_word_embeddings": True})
    with torch.no_grad():
        lm.root.get_input_embeddings().weight.mul_(2)
    packed = travelling.pack_model(lm)
    arrived = travelling.unpack_model(packed)
    assert torch.equal(
        arrived.model(torch.tensor([[1, 2, 3]])).logits, lm.model(torch.tensor([[1, 2, 3]])).logits
    )
    assert arrived.root.lm_head.weight is arrived.root.get_input_embeddings().weight
    addresses = {array.ctypes.data for array in packed.storages}
    assert all(
        weight.untyped_storage().data_ptr() in addresses for weight in arrived.root.parameters()
    )


def test_a_model_that_arrives_with_other_weights_is_refused(small):
    packed = travelling.pack_model(small)
    packed.storages[0] = packed.storages[0].copy()
    packed.storages[0][5] ^= 1
    with pytest.raises(
        OtherModel, match="the weights in the actor have the sha256 .*, and .* was sent"
    ):
        travelling.unpack_model(packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda lm: lm.root.register_forward_hook(lambda *_: None),
            "carries hooks that are not hookkit's",
        ),
        (lambda lm: setattr(lm.root, "_hf_hook", object()), "is offloaded or spread by accelerate"),
        (lambda lm: lm.root.lm_head.to("meta"), "is offloaded or spread by accelerate"),
    ],
)
def test_a_model_that_cannot_be_had_twice_is_refused_before_anything_is_written(
    tmp_path, change, words
):
    lm = hk.LM(tiny("llama"))
    change(lm)
    with pytest.raises(Unsupported, match=words):
        harvest(lm, tmp_path / "a", engine="ray")
    with pytest.raises(Unsupported, match=words):
        hk.sweep(
            lm,
            [[1, 2]],
            {"layer": [0]},
            lambda layer: hk.ablate(hk.Site("z", layer)),
            hk.metrics.prob(3),
            engine="ray",
        )
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_sent_is_said(cluster, small):
    lock = threading.Lock()
    with pytest.raises(Unsupported, match="cannot go to an actor .*lock.*: a function may use"):
        hk.sweep(
            small,
            [[1, 2]],
            {"layer": [0]},
            lambda layer: hk.edit(hk.Site("z", layer), lambda v: v * (2 + lock.locked())),
            hk.metrics.prob(3),
            engine=hk.Ray(actors=1),
        )


# ---- which engine


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        ("dask", BadHook, r"engine='dask' is unknown: say hk\.Ray\(…\), or 'ray', or None"),
        (hk.Ray(gpus=1), Unsupported, "the model is on the cpu, and its actors have gpus=1"),
        (
            hk.Ray(actors=5),
            Unsupported,
            "5 actors of 1 CPU each were asked for, .* has 4 CPU on 1 node, room for 4",
        ),
        (hk.Ray(cpus=8), Unsupported, "1 actors of 8 CPU each"),
        (
            hk.Ray(address="elsewhere:6379"),
            Unsupported,
            "address='elsewhere:6379' was asked for, and this program",
        ),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(cluster, small, tmp_path, engine, error, words):
    with pytest.raises(error, match=words):
        harvest(small, tmp_path, engine=engine)


@pytest.mark.parametrize(
    "given", [{"actors": 0}, {"actors": 1.5}, {"cpus": -1}, {"gpus": "all"}, {"memory": 0}]
)
def test_an_actor_of_nothing_is_refused(given):
    with pytest.raises(BadHook, match=f"Ray.{next(iter(given))}="):
        hk.Ray(**given)


def test_threads_follow_the_cpus():
    assert [hk.Ray(cpus=cpus).threads for cpus in (0, 0.5, 1, 4)] == [1, 1, 1, 4]


def test_without_ray_every_entrance_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["ray"] = None
import hookkit as hk
lm = hk.tiny("llama")
at = lambda layer: hk.ablate(hk.Site("z", layer))
for work in (
    lambda: hk.harvest(lm, [[1, 2]], "resid_post.1", sys.argv[1], engine="ray"),
    lambda: hk.sweep(lm, [[1, 2]], {"layer": [0]}, at, hk.metrics.prob(3), engine=hk.Ray(actors=2)),
    lambda: hk.ablations(lm, [[1, 2]], "z", hk.metrics.prob(3), engine="ray"),
):
    try:
        work()
    except hk.errors.MissingExtra as error:
        print(error)
from hookkit.cli import app
texts = sys.argv[1] + ".txt"
open(texts, "w").write("I like oat milk")
for words in (["harvest", texts, "z.1", "--out", "a"], ["sweep", "ablations", "Tea", "z", "--token", " milk"]):
    try:
        app([*words, "--engine", "ray"])
    except SystemExit as ended:
        print(ended.code)
"""
    done = child(str(tmp_path / "a"), code=code)
    assert done.returncode == 0, done.stderr
    words = "engine='ray' needs Ray, which is not installed: pip install 'hookkit[ray]'"
    assert done.stdout.splitlines() == [words] * 3 + ["2"] * 2
    assert done.stderr.splitlines() == [f"hookkit: {words}"] * 2
    assert not (tmp_path / "a").exists()
