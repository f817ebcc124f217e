"""`writers="actors"`: the files of one process, byte for byte, written by many, whoever is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import killing
import psutil
import pytest
import slow_disk
import torch
from conftest import tiny
from dictionaries import write
from object_store import Store

import hookkit as hk
from hookkit.data.harvest import writing
from hookkit.data.harvest.shard_computation import ShardComputation
from hookkit.errors import BadHook, HarvestChanged, Unsupported
from hookkit.runs.engines.actors import Step

ray = pytest.importorskip("ray")

HERE = Path(__file__).parents[1]
SEEN = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
SLOW = "3"  # seconds a megabyte: a shard takes a twentieth of a second


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As an actor of one CPU has, so that it computes the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """What the slow disks of all processes wrote."""
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@pytest.fixture(scope="module")
def cluster(log):
    """A Ray with room for four actors of one CPU, whose disks are slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SEEN)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        env = {slow_disk.SECONDS: SLOW, slow_disk.LOG: str(log)}
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"worker_process_setup_hook": "slow_disk.install", "env_vars": env},
        )
        yield ray.get_runtime_context().gcs_address
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


def harvest(lm, folder, texts=None, **changes):
    texts = killing.texts() if texts is None else texts
    return hk.harvest(lm, iter(texts), killing.SITES, folder, **(killing.SETTINGS | changes))


def by_actors(lm, folder, actors=2, texts=None, **changes):
    return harvest(lm, folder, texts, engine=hk.Ray(actors=actors), writers="actors", **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the same, byte for byte


def test_four_actors_that_write_make_the_files_of_one_process(
    cluster, small, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(writing, "write_shard", None)  # so that this process can write none
    made = by_actors(small, tmp_path / "a", 4)
    assert files(tmp_path / "a") == files(undisturbed)
    assert len(made.shards) > 20 and made.finished
    made.verify()


def test_features_pieces_positions_and_dtypes_are_those_of_one_process(cluster, tmp_path):
    dictionary = hk.load_dictionary(write(tmp_path / "sae", "topk"))
    lm = hk.LM(tiny("llama")).with_dictionaries(dictionary, check=False)
    sites = ["feat.resid_post.1", "feat.resid_post.1.7", "resid_post.1", "z.2.1"]
    texts = [*killing.texts()[:60], [], [5]]
    settings = {"batch_tokens": 64, "shard_size": 40, "progress": False, "on_error": "skip"}
    settings |= {"pos": slice(1, None), "context": 12, "long": "split", "dtype": "bfloat16"}
    hk.harvest(lm, texts, sites, tmp_path / "one", **settings)
    many = {"engine": hk.Ray(actors=2), "writers": "actors"}
    hk.harvest(lm, texts, sites, tmp_path / "many", **settings, **many)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert len(hk.open_harvest(tmp_path / "one").shards) > 5


# ---- killed


def actors() -> list[psutil.Process]:
    """The processes of actors on this machine that are children of this test's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "".join(process.cmdline()).startswith("ray::Actor"):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("n_actors", "kills"), [(2, 2), pytest.param(4, 10, marks=pytest.mark.slow)]
)
def test_actors_killed_at_random_moments_lose_nothing(
    cluster, small, undisturbed, tmp_path, n_actors, kills
):
    drawn, killed, cut = random.Random(kills), set(), 0
    moments = set(range(150 - 10 * kills, 150, 10))

    def texts():
        nonlocal cut
        for number, ids in enumerate(killing.texts()):
            while number in moments:
                alive = [process for process in actors() if process.pid not in killed]
                time.sleep(drawn.uniform(0, 0.1))
                if alive:
                    chosen = drawn.choice(alive)
                    chosen.kill()
                    killed.add(chosen.pid)
                    cut += any(tmp_path.glob("a/.0*.making"))
                    break
            yield ids

    by_actors(small, tmp_path / "a", n_actors, texts())
    assert len(killed) == kills
    assert cut or kills < 10  # some while they wrote
    assert files(tmp_path / "a") == files(undisturbed)


DRIVER = """
import os, signal, sys, time
import killing, object_store, torch
import hookkit as hk

def texts():
    for number, ids in enumerate(killing.texts()):
        if number == 110:
            time.sleep(0.7)  # shards that come before an earlier one
            os.kill(os.getpid(), signal.SIGKILL)
        yield ids

torch.set_num_threads(1)
engine = hk.Ray(actors=2, address=sys.argv[2])
lm = hk.tiny("llama")
hk.harvest(lm, texts(), killing.SITES, sys.argv[1], engine=engine, writers="actors", **killing.SETTINGS)
"""


def test_a_driver_killed_in_the_middle_goes_on_and_complete_shards_stay(
    cluster, small, undisturbed, tmp_path
):
    folder = tmp_path / "a"
    words = [sys.executable, "-c", DRIVER, str(folder), cluster]
    env = os.environ | {"PYTHONPATH": SEEN}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == -9, ended.stderr
    notes = [path.name[1:].removesuffix(".json") for path in folder.glob(".*.json")]
    indexed = [shard.file for shard in hk.open_harvest(folder).shards.all]
    assert indexed and not (folder / ".lock").stat().st_size
    before = {name: (folder / name).stat().st_ino for name in {*indexed, *notes}}
    shutil.copytree(folder, tmp_path / "here", copy_function=shutil.copy)
    by_actors(small, folder)
    assert {name: (folder / name).stat().st_ino for name in before} == before
    harvest(small, tmp_path / "here")  # one process goes on where actors began
    assert files(folder) == files(undisturbed) == files(tmp_path / "here")


def in_this_process(monkeypatch, change=None) -> list[object]:
    """Lets the work of actors run here; `change` is called with each plan before it is computed."""
    results = []

    def run(engine, lm, work: ShardComputation, steps: list[Step]) -> None:
        for step in steps:
            if change:
                change(work, step.unit)
            results.append(work.compute(step.unit) if step.unit else None)
            step.then(results[-1])

    monkeypatch.setattr(writing, "run_steps", run)
    return results


def test_a_complete_shard_is_taken_only_with_the_same_texts_and_bytes(
    small, undisturbed, tmp_path, monkeypatch
):
    computed = []
    compute = writing.ValueComputation.compute
    count = lambda work, batch: (computed.append(batch), compute(work, batch))[1]  # noqa: E731
    monkeypatch.setattr(writing.ValueComputation, "compute", count)

    def twice(work, plan):
        work.compute(plan)  # by an actor that died before it could say so
        before = len(computed)
        work.compute(plan)
        assert len(computed) == before
        path = work.folder / f"{plan.number:05d}.safetensors"
        if plan.number == 3:  # other bytes are not taken
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            work.compute(plan)
            assert len(computed) > before

    in_this_process(monkeypatch, twice)
    by_actors(small, tmp_path / "a")
    assert files(tmp_path / "a") == files(undisturbed)
    (tmp_path / "a" / "index.jsonl").unlink()  # notes of other texts are not taken
    note = tmp_path / "a" / ".00000.safetensors.json"
    line = json.loads((undisturbed / "index.jsonl").read_text().splitlines()[0])
    note.write_text(json.dumps(line | {"stream": "0" * 64}))
    in_this_process(monkeypatch)
    before = len(computed)
    by_actors(small, tmp_path / "a")
    assert len(computed) > before and files(tmp_path / "a") == files(undisturbed)


def test_an_actor_whose_harvest_has_ended_writes_nothing_more(small, tmp_path, monkeypatch):
    def end(work, plan):
        if plan.number == 2:
            (tmp_path / "a" / work.mark).unlink()

    in_this_process(monkeypatch, end)
    with pytest.raises(Unsupported, match="has ended, or another process harvests into the folder"):
        by_actors(small, tmp_path / "a")
    assert [path.name for path in sorted(tmp_path.glob("a/*0*.s*"))] == [
        "00000.safetensors",
        "00001.safetensors",
    ]


# ---- at an address


@pytest.fixture
def store():
    store = Store()
    yield store
    store.shutdown()
    store.server_close()


def test_actors_that_are_killed_while_they_send_to_a_store_make_the_files_of_a_folder(
    cluster, small, undisturbed, store, monkeypatch
):
    killed = set()

    def kill(process, data):
        os.kill(process, signal.SIGKILL)
        killed.add(process)
        return data if len(killed) == 1 else None  # it has come, or not

    store.faults = {"PUT 00003.safetensors": kill, "PUT .00007.safetensors.json": kill}
    monkeypatch.setattr(writing, "write_shard", None)  # so that this process can write none
    made = by_actors(small, store.address("a"))
    assert len(killed) == 2 and os.getpid() not in killed
    assert store.files("a") == files(undisturbed)
    made.verify()
    assert torch.equal(made["z.2"][:], hk.open_harvest(undisturbed)["z.2"][:])


def test_a_driver_killed_while_actors_send_to_a_store_goes_on(cluster, small, undisturbed, store):
    words = [sys.executable, "-c", DRIVER, store.address("a"), cluster]
    env = os.environ | {"PYTHONPATH": SEEN}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == -9, ended.stderr
    time.sleep(1)  # until Ray has ended the actors
    complete = [name[1:].removesuffix(".json") for name in store.files("a") if "json" in name[-4:]]
    complete = [name for name in complete if name.endswith(".safetensors")]
    assert len(hk.open_harvest(store.address("a")).shards) >= 5
    store.log.clear()
    by_actors(small, store.address("a"))
    assert len(complete) >= 5 and not {f"PUT {name}" for name in complete} & set(store.log)
    assert store.files("a") == files(undisturbed)


def test_an_address_that_actors_do_not_reach(cluster, small):
    with pytest.raises(Unsupported, match="does not see the .* 'memory://a'.*or an address that"):
        by_actors(small, "memory://a", 1)


def test_a_shard_in_a_store_is_taken_only_with_the_same_texts_and_bytes(
    small, undisturbed, store, monkeypatch
):
    def twice(work, plan):
        work.compute(plan)  # by an actor that died before it could say so
        store.log.clear()
        work.compute(plan)
        file = f"{plan.number:05d}.safetensors"
        assert f"PUT {file}" not in store.log and f"GET {file}" in store.log
        if plan.number == 3:  # other bytes are not taken
            store.objects[f"a/{file}"] = store.objects[f"a/{file}"][:-1] + b"x"
            work.compute(plan)
            assert f"PUT {file}" in store.log
        if plan.number == 4:  # nor a note of other texts
            note = json.loads(store.objects[f"a/.{file}.json"])
            store.objects[f"a/.{file}.json"] = json.dumps(note | {"stream": "0" * 64}).encode()
            work.compute(plan)
            assert f"PUT {file}" in store.log

    in_this_process(monkeypatch, twice)
    by_actors(small, store.address("a"))
    assert store.files("a") == files(undisturbed)


# ---- errors


def test_a_folder_that_a_node_does_not_see_is_refused_before_anything_is_computed(
    cluster, small, tmp_path, monkeypatch
):
    @contextmanager
    def elsewhere(folder, name):
        yield folder / ".writers.00000000.making"

    monkeypatch.setattr(writing, "mark_folder", elsewhere)
    with pytest.raises(Unsupported, match=f"the node '.*' does not see .*{tmp_path.name}/a.*share"):
        by_actors(small, tmp_path / "a", 1)
    assert set(files(tmp_path / "a")) == {"harvest.json"}


def test_actors_that_write_need_an_engine(small, tmp_path):
    with pytest.raises(BadHook, match="writers='actors' needs actors: add engine='ray'"):
        harvest(small, tmp_path / "a", writers="actors")
    with pytest.raises(hk.errors.BadArgument, match="'driver'"):
        harvest(small, tmp_path / "a", writers="nodes")
    assert not (tmp_path / "a").exists()


def test_an_error_names_its_batch_and_the_shards_before_it_stay(cluster, tmp_path):
    lm = hk.LM(tiny("llama"))
    with torch.no_grad():
        lm.root.get_input_embeddings().weight[319] = 3e38
    texts = [[token % 319 for token in ids] for ids in killing.texts()]
    harvest(lm, tmp_path / "whole", texts, dtype="float16")
    texts[100] = [1, 319, 2]
    with pytest.raises(BadHook, match="dtype='float16' holds numbers up to 65504") as raised:
        by_actors(lm, tmp_path / "a", 1, texts, dtype="float16")
    batch, shard, _ = raised.value.__notes__
    assert "in the batch of text" in batch and "100" in batch
    assert "in shard" in shard and "on an actor" in shard
    done = hk.open_harvest(tmp_path / "a")
    assert len(done.shards) > 10 and done.texts <= 100
    lines = (tmp_path / "whole" / "index.jsonl").read_bytes()
    assert lines.startswith((tmp_path / "a" / "index.jsonl").read_bytes())


@pytest.mark.slow
def test_a_shard_that_is_missing_is_made_again_or_said_to_differ(
    cluster, small, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "a")
    (tmp_path / "a" / "00004.safetensors").unlink()
    by_actors(small, tmp_path / "a", 1)
    assert files(tmp_path / "a") == files(undisturbed)
    index = tmp_path / "a" / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    lines[4] = json.dumps(json.loads(lines[4]) | {"sha256": "0" * 64}) + "\n"
    index.write_text("".join(lines))
    (tmp_path / "a" / "00004.safetensors").unlink()
    with pytest.raises(HarvestChanged, match="00004.safetensors was missing and was made again"):
        by_actors(small, tmp_path / "a", 1)


# ---- speed


def throughput(log: Path) -> float:
    """Megabytes a second from when all processes that write have begun to the end."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    begins: dict[int, float] = {}
    for process, began, _, _ in sorted(lines, key=lambda line: line[1]):
        begins.setdefault(process, began)
    since, end = max(begins.values()), max(line[2] for line in lines)
    size = 0.0
    for _, began, ended, bytes_ in lines:
        size += bytes_ * max(0, ended - max(began, since)) / (ended - began)
    return size / 1e6 / (end - since)


@pytest.mark.slow
def test_where_the_disk_is_slow_two_writers_are_nearly_twice_as_fast_as_one(
    cluster, small, tmp_path, log, monkeypatch
):
    monkeypatch.setenv(slow_disk.SECONDS, SLOW)
    monkeypatch.setenv(slow_disk.LOG, str(log))
    monkeypatch.setattr("hookkit.files.atomic._sync", slow_disk.slowly)
    texts = killing.texts(count=1200)
    settings = {"shard_size": 400, "batch_tokens": 400, "engine": hk.Ray(actors=2)}
    speed = {}
    for writers in ("driver", "actors"):
        log.unlink(missing_ok=True)
        harvest(small, tmp_path / writers, texts, writers=writers, **settings)
        speed[writers] = throughput(log)
    assert files(tmp_path / "driver") == files(tmp_path / "actors")
    print("megabytes a second:", speed)
    assert speed["actors"] >= 1.8 * speed["driver"], speed
