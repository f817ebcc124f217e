"""A harvest at an address: the files of a folder, in a store without renames, appends and locks, whoever is killed."""

import os
import pickle
import signal
import sys
from pathlib import Path

import fsspec
import killing
import pytest
import torch
from dictionaries import write
from fsspec.registry import known_implementations
from object_store import Store

import hookkit as hk
from hookkit.data.harvest import writing
from hookkit.errors import BadFile, DamagedHarvest, HarvestChanged, MissingExtra, Unsupported
from hookkit.files.address import Address

# Python from 3.12 on says this of the store's thread, which a child does not use
FORKS = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store():
    store = Store()
    yield store
    store.shutdown()
    store.server_close()


@pytest.fixture(scope="module")
def small() -> hk.LM:
    return hk.tiny("llama")


def harvest(lm, folder, texts=None, **changes):
    texts = killing.texts() if texts is None else texts
    return hk.harvest(lm, iter(texts), killing.SITES, folder, **(killing.SETTINGS | changes))


@pytest.fixture(scope="module")
def local(small, tmp_path_factory):
    """A harvest on the disk."""
    return harvest(small, tmp_path_factory.mktemp("local"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def undisturbed(local) -> dict[str, bytes]:
    return files(local.shards.folder)


# ---- the same files and the same rows


def check_same(made, local):
    assert repr(made) == repr(local) and made.finished
    made.verify()
    for site in killing.SITES:
        assert torch.equal(made[site][:], local[site][:])
    assert torch.equal(made["z.2.1"][[5, -1, 700]], local["z.2.1"][[5, -1, 700]])
    assert made.tokens(300) == local.tokens(300)
    assert made.table(slice(40, 90), sites="z.2.1").equals(
        local.table(slice(40, 90), sites="z.2.1")
    )
    for one, two in zip(made.batches(300, seed=3), local.batches(300, seed=3), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two)
    ours, theirs = made.statistics(covariance=True), local.statistics(covariance=True)
    assert torch.equal(ours["resid_post.1"].covariance, theirs["resid_post.1"].covariance)


def test_a_store_of_objects_has_the_files_of_a_folder_and_reads_as_one(
    store, small, local, undisturbed
):
    made = harvest(small, store.address("runs/a"))
    assert store.files("runs/a") == undisturbed
    check_same(made, local)
    check_same(hk.open_harvest(store.address("runs/a/")), local)


def test_a_shard_is_whole_before_a_note_or_the_index_names_it(store, small, monkeypatch):
    monkeypatch.setattr(writing, "CHECKPOINT", 7)
    made = harvest(small, store.address("a"))
    order = [line for line in store.log if not line.startswith("GET")]
    ends = [number for number, line in enumerate(order) if line == "PUT index.jsonl"]
    assert len(ends) == len(made.shards) // 7 + 1
    for number, shard in enumerate(made.shards.all):
        sent, noted = order.index(f"PUT {shard.file}"), order.index(f"PUT .{shard.file}.json")
        assert sent < noted < ends[min(number // 7, len(ends) - 1)]
        assert order.index(f"DELETE .{shard.file}.json") > ends[-1]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_file_systems_of_fsspec_itself(scheme, small, local, undisturbed, tmp_path):
    address = f"{scheme}://{tmp_path}/a"
    made = harvest(small, address)
    check_same(made, local)
    fs, root = fsspec.url_to_fs(address)
    assert {
        name.rpartition("/")[2]: fs.cat_file(name) for name in fs.ls(root, False)
    } == undisturbed


def test_features_and_skipped_texts(store, tmp_path):
    lm = hk.tiny("llama").with_dictionaries(
        hk.load_dictionary(write(tmp_path / "sae", "topk")), check=False
    )
    settings = {"shard_size": 40, "progress": False, "on_error": "skip", "dtype": "bfloat16"}
    sites, texts = ["feat.resid_post.1", "resid_post.1"], [*killing.texts()[:60], [], [5]]
    one = hk.harvest(lm, texts, sites, tmp_path / "one", **settings)
    made = hk.harvest(lm, texts, sites, store.address("a"), **settings)
    assert store.files("a") == files(tmp_path / "one")
    rows = [3, 200, 90]
    assert torch.equal(made[sites[0]][rows].to_dense(), one[sites[0]][rows].to_dense())


def test_an_unfinished_harvest_is_read_while_it_is_written(store, small, local):
    lengths = []

    def texts():
        for number, ids in enumerate(killing.texts()):
            if number % 50 == 49:
                part = hk.open_harvest(store.address("a"))
                assert not part.finished and len(part.shards) > len(lengths)
                part.verify()
                assert torch.equal(part["z.2"][:], local["z.2"][: len(part)])
                lengths.append(len(part))
            yield ids

    harvest(small, store.address("a"), texts())
    assert sorted(lengths) == lengths and len(lengths) == 3


@FORKS
def test_other_processes_read_it(store, small, local):
    made = harvest(small, store.address("a"))
    column = made["resid_post.1"]
    assert len(column[:300])  # this process has open shards and a connection
    loader = torch.utils.data.DataLoader(
        column, batch_size=256, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), local["resid_post.1"][:])
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again["z.2"][:], local["z.2"][:])


def test_nothing_stays_on_this_machine(store, small, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = harvest(small, store.address("a"))
    assert len(made["z.2"][:]) and made.statistics() and not list(tmp_path.iterdir())
    made.shards.close_before(len(made))
    store.log.clear()
    for _ in made.batches(100):
        pass
    fetched = [line for line in store.log if line.startswith("GET")]
    assert fetched == [f"GET {shard.file}" for shard in made.shards.all]  # each once, in order


# ---- killed


def harvest_in_a_child(lm, address) -> int:
    """The signal that ended the child."""
    child = os.fork()
    if child == 0:
        try:
            harvest(lm, address)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@FORKS
@pytest.mark.parametrize("is_torn", [False, True])
def test_a_driver_killed_while_it_sends_a_file_goes_on(
    store, small, undisturbed, is_torn, monkeypatch
):
    """In a store that is torn, a file of which half has come stays so."""
    monkeypatch.setattr(writing, "CHECKPOINT", 7)
    killed = []

    def kill(process, data):
        os.kill(process, signal.SIGKILL)
        killed.append(process)
        return data[: len(data) // 2] if is_torn else None

    last = "PUT .00013.safetensors.json"
    names = ["PUT 00003.safetensors", "PUT .00005.safetensors.json", "PUT index.jsonl", last]
    complete: dict[str, bytes] = {}
    for name in names:
        store.faults = {name: kill}
        store.log.clear()
        assert harvest_in_a_child(small, store.address("a")) == signal.SIGKILL
        assert not {f"PUT {file}" for file in complete} & set(store.log)
        part = hk.open_harvest(store.address("a"))
        part.verify()
        complete = {shard.file: undisturbed[shard.file] for shard in part.shards.all}
        assert complete.items() <= store.files("a").items()
    assert len(killed) == 4 and len(complete) == 13
    assert any(name.startswith(".writers") for name in store.files("a"))
    store.log.clear()
    harvest(small, store.address("a"))
    assert not {f"PUT {file}" for file in complete} & set(store.log)
    assert store.files("a") == undisturbed


def test_a_driver_killed_at_the_end_of_the_index_or_after_it(store, small, undisturbed):
    harvest(small, store.address("a"))
    whole, index = store.files("a"), undisturbed["index.jsonl"]
    lines = index.splitlines(keepends=True)
    notes = {}
    for line in lines[:-1]:
        name = line.split(b'"')[3].decode()
        notes[f"a/.{name}.json"] = line.strip()
    for part in (index, index[:-5], index[:1000], b""):  # torn, while all notes are there
        store.objects |= notes | {"a/index.jsonl": part}
        store.log.clear()
        harvest(small, store.address("a"))
        assert store.files("a") == whole
        assert not any(line.startswith("PUT 0") for line in store.log)


def test_a_store_that_fails_is_an_error_and_the_harvest_goes_on(store, small, undisturbed):
    store.faults["PUT 00006.safetensors"] = lambda process, data: None
    with pytest.raises(BadFile, match="'objects://.*/a' cannot be written: 503"):
        harvest(small, store.address("a"))
    assert len(hk.open_harvest(store.address("a")).shards) == 6
    assert not any(name.startswith(".writers") for name in store.files("a"))
    harvest(small, store.address("a"))
    assert store.files("a") == undisturbed


# ---- damaged, changed, taken


def test_a_damaged_shard_is_an_error_and_is_made_again_when_it_is_deleted(
    store, small, undisturbed
):
    made = harvest(small, store.address("a"))
    key = "a/00004.safetensors"
    data = store.objects[key]
    store.objects[key] = data[:-1] + bytes([data[-1] ^ 1])  # one bit of the last value
    first = made.shards.starts[4]
    with pytest.raises(DamagedHarvest, match="00004.safetensors, shard 4 of .*sha256.*verify"):
        made["z.2"][first]
    assert len(made["z.2"][:first]) == first
    with pytest.raises(DamagedHarvest, match="00004.safetensors was changed; the other"):
        made.verify()
    for damage in (None, data[:-1]):
        store.objects.pop(key, None)
        if damage is not None:
            store.objects[key] = damage
        with pytest.raises(DamagedHarvest, match="00004"):
            hk.open_harvest(store.address("a")).verify()
        with pytest.raises(DamagedHarvest, match="missing"):
            hk.open_harvest(store.address("a"))["z.2"][first]
        harvest(small, store.address("a"))
        assert store.files("a") == undisturbed


def test_other_settings_or_texts_are_refused_and_change_nothing(store, small):
    address = store.address("a")
    with pytest.raises(DamagedHarvest, match="'a' has no harvest.json, so it is no harvest"):
        hk.open_harvest(address)
    harvest(small, address)
    before = store.files("a")
    with pytest.raises(HarvestChanged, match="'a' has a harvest of other settings: shard_size"):
        harvest(small, address, shard_size=61)
    with pytest.raises(HarvestChanged, match="'a' is finished and has 150 texts"):
        harvest(small, address, [*killing.texts(), [5]])
    with pytest.raises(HarvestChanged):
        harvest(small, address, [[5], *killing.texts()])
    store.objects["a/mine.txt"] = b"precious"
    harvest(small, address)
    assert store.files("a") == before | {"mine.txt": b"precious"}
    del store.objects["a/harvest.json"]
    with pytest.raises(DamagedHarvest, match="'a' has shards and no harvest.json"):
        harvest(small, address)


def test_the_last_program_that_claims_an_address_writes_there(store, small, undisturbed):
    def texts():
        for number, ids in enumerate(killing.texts()):
            if number == 60:
                harvest(small, store.address("a"))
            yield ids

    with pytest.raises(Unsupported, match="has ended, or another one writes there now"):
        harvest(small, store.address("a"), texts())
    assert store.files("a") == undisturbed


# ---- addresses


def test_a_package_that_is_missing_is_named_before_the_model_runs(small, monkeypatch):
    implementation = {"class": "no_such_package.FS", "err": "Install no_such_package for it"}
    monkeypatch.setitem(known_implementations, "absent", implementation)
    monkeypatch.setattr(writing, "probe_sites", None)
    with pytest.raises(MissingExtra, match="'absent://b/a' needs a package.*Install no_such_pack"):
        harvest(small, "absent://me:secret@b/a")
    with pytest.raises(MissingExtra, match="no_such_package"):
        hk.open_harvest("absent://b/a")


def test_a_password_is_not_shown(small):
    with pytest.raises(BadFile, match="'ftp://localhost:1/a' cannot be reached") as raised:
        harvest(small, "ftp://me:secret@localhost:1/a")
    assert "secret" not in str(raised.value)
    fs = fsspec.filesystem("memory", password="secret")
    assert "secret" not in repr(Address("memory://a", "/a", lambda: fs))


def test_a_server_that_is_not_there_is_an_error(small):
    with pytest.raises(BadFile, match="'objects://localhost:1/a' cannot be"):
        harvest(small, "objects://localhost:1/a")
    with pytest.raises(BadFile, match="cannot be read"):
        hk.open_harvest("objects://localhost:1/a")
