"""What would a model of 70 billion parameters and a corpus of ten billion tokens take?

And what would fail first?

Measured here: tokens a second, bytes of each site, what putting parts of a tensor together costs,
what writing costs, what an actor of Ray costs. Assumed, and said so: what the devices of a cluster
can do. The forecast is arithmetic on both, and the page says which number comes from where. It is
answered by the slowest part of each plan.

python -m experiments.benchmarks.scale        three minutes on two cores; writes results/scale/
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

import hookkit as hk
from hookkit.files.atomic import write_tensors
from hookkit.models.devices import Split

QUESTION = (
    "What would a model of 70 billion parameters and a corpus of ten billion tokens take, and what "
    "fails first?"
)
SHAPE: dict[str, Any] = {  # of Llama 3 70B
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
TOKENS, CONTEXT = 10_000_000_000, 2048
BYTES = 2  # of a number in bfloat16
ASSUMED = {  # what nobody measured here
    "a GPU, bfloat16, FLOP/s": 989e12,
    "share of it that a forward reaches": 0.4,
    "between GPUs of a node, bytes/s": 450e9,
    "between nodes, bytes/s for each node": 50e9,
    "disks of a node, bytes/s": 5e9,
    "GPUs of a node": 8,
}
KEPT = {
    "statistics of resid_post.40": ("resid_post", 40, 0),
    "resid_post.40": ("resid_post", 40, 1),
    "resid_post, three layers up to 60": ("resid_post", 60, 3),
    "mlp_post.40": ("mlp_post", 40, 1),
    "z.40": ("z", 40, 1),
    "pattern.40": ("pattern", 40, 1),
    "resid_post, all layers": ("resid_post", 79, 80),
}


def main() -> None:
    torch.set_num_threads(2)
    lm = hk.load(device="cpu")
    with hk.record(
        "results/scale", title="Larger than one machine", question=QUESTION, lm=lm, seed=0
    ) as results:
        found = {**computing(lm), **gathering(), **writing(), **acting(), **writing_on_actors()}
        measured = pd.DataFrame({"what": list(found), "value": list(found.values())})
        results.table("measured", measured, caption="On this machine; its other users count in.")
        large = described()
        results.table(
            "sites",
            sites(lm, large),
            caption="Numbers of a token at each site, and bytes in bfloat16.",
        )
        table = results.table(
            "forecast", forecast(large, found), caption="Hours for the corpus; the largest decides."
        )
        results.answer(answer({"forecast": table}))
        page = plan(measured, table, found)
        (results.folder / "plan.md").write_text(page, encoding="utf-8")
    print(page)


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    table = tables["forecast"]
    eight = table[table["gpus"] == 8].set_index("kept")
    stream, patterns = eight.loc["resid_post.40"], eight.loc["pattern.40"]
    return (
        f"On eight GPUs the forwards take {stream['forwards']:.0f} hours, and to keep one layer of "
        f"the residual stream takes {stream['terabytes']:.0f} TB. What fails first is the one "
        f"process that writes: it needs {stream['one writer']:.0f} hours. With a writer on every "
        f"node the disks need {stream['disks of every node']:.0f} hours, and the forwards decide. "
        f"Attention patterns of one layer ({patterns['terabytes']:,.0f} TB) cannot be kept at all. "
        "This is a forecast, from speeds measured on two cores and assumed for GPUs."
    )


# ---- measured


def computing(lm: hk.LM) -> dict[str, float]:
    ids = torch.randint(0, 49000, (8, 128), generator=torch.Generator().manual_seed(0))
    model: Any = lm.model

    @torch.no_grad()
    def run() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    seconds = taken(run, 5)
    embeddings: Any = lm.model.get_input_embeddings()  # pyright: ignore
    inside = sum(weight.numel() for weight in lm.model.parameters()) - embeddings.weight.numel()
    speed = ids.numel() / seconds
    return {
        "tokens a second, default model, two threads": speed,
        "FLOP/s of that": speed * 2 * inside,
    }


def gathering() -> dict[str, float]:
    """Measures putting a tensor together on two processes over gloo: at all, and for each byte."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gathered.json"
        made = [*words, "-m", "experiments.benchmarks.scale", "--gather", str(path)]
        subprocess.run(made, env=settings, check=True, capture_output=True)
        small, large = json.loads(path.read_text())
    return {
        "seconds to put a small tensor together, two processes": small,
        "bytes a second of a large one": large,
    }


def gather(path: Path) -> None:
    from hookkit.models.devices import Ranks

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ranks = Ranks(torch.distributed.group.WORLD, torch.distributed.get_rank(), 2)
    seconds = []
    for tokens in (1, 2048):
        part = torch.randn(1, tokens, SHAPE["hidden_size"] // 2)
        split = Split(2, (part.shape[-1], part.shape[-1]))
        seconds.append(taken(lambda part=part, split=split: ranks.whole(part, split), 20))
    if ranks.rank == 0:
        path.write_text(json.dumps([seconds[0], 2048 * SHAPE["hidden_size"] * 4 / seconds[1]]))
    torch.distributed.destroy_process_group()


def writing() -> dict[str, float]:
    """A shard: written, its sha256, fsync; by one thread."""
    values = {"resid_post.40": torch.randn(2**25)}  # 128 MiB
    with tempfile.TemporaryDirectory(dir=".") as folder:
        seconds = taken(lambda: write_tensors(Path(folder) / "shard.safetensors", values), 5)
    return {"bytes a second of one writer, sha256 and fsync": 2**27 / seconds}


def acting() -> dict[str, float]:
    """What a unit of work costs beside its work, with one actor of Ray."""
    import ray

    lm, texts = hk.tiny("llama"), [[5, 6, 7, 8]] * 2048
    settings: dict[str, Any] = {"batch_tokens": 64, "shard_size": 256, "progress": False}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        seconds = []
        for engine in ({}, {"engine": hk.Ray(actors=1)}):

            def run(engine: dict[str, Any] = engine) -> None:
                with tempfile.TemporaryDirectory() as folder:
                    hk.harvest(
                        lm, texts, "resid_post.1", Path(folder) / "harvest", **settings, **engine
                    )

            seconds.append(taken(run, 3))
    finally:
        ray.shutdown()
    return {
        "seconds of a unit of Ray beside its work, and of starting an actor": (
            seconds[1] - seconds[0]
        )
        / 32
    }


def writing_on_actors() -> dict[str, float]:
    """Measures shards of 32 MiB of a wide embedding: two actors compute, and one or both write."""
    import ray

    lm = hk.tiny("llama", config={"hidden_size": 2048, "num_hidden_layers": 1})
    texts = torch.randint(0, 300, (576, 128), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, float] = {}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for writers, n_writers, label in (
            ("driver", 1, "bytes a second, two actors compute and one process writes"),
            ("actors", 2, "bytes a second, two actors compute and write"),
        ):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                settings: dict[str, Any] = {"shard_size": 4096, "progress": False}
                settings |= {"engine": hk.Ray(actors=2), "writers": writers}
                hk.harvest(lm, texts, "embed", Path(folder) / "harvest", **settings)
                found[label] = speed_of_shards(Path(folder) / "harvest", n_writers)
    finally:
        ray.shutdown()
    return found


def speed_of_shards(folder: Path, n_writers: int) -> float:
    """Returns bytes a second from when every writer has written a shard to the end."""
    files = [path.stat() for path in folder.glob("*.safetensors")]
    files.sort(key=lambda file: file.st_mtime)
    seconds = files[-1].st_mtime - files[n_writers - 1].st_mtime
    return sum(file.st_size for file in files[n_writers:]) / seconds


def taken(run: Any, rounds: int) -> float:
    """The median of some rounds, in seconds, after one that is not counted."""
    found = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        run()
        found += [time.perf_counter() - started] if number else []
    return median(found)


# ---- the large model


def described() -> hk.LM:
    """The large model without its weights: its sizes are those of its modules."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return hk.LM(LlamaForCausalLM(LlamaConfig(**SHAPE)))


def numbers(lm: hk.LM, site: str, layer: int) -> int:
    """How many numbers a site has for each token; a pattern has the keys of a context."""
    return math.prod(size or CONTEXT for size in lm.shape(hk.Site(site, layer)))


def sites(small: hk.LM, large: hk.LM) -> pd.DataFrame:
    rows = []
    for name in ("resid_post", "z", "q", "k", "mlp_post", "pattern"):
        per_token = numbers(large, name, 1)
        rows.append(
            (
                name,
                numbers(small, name, 1),
                per_token,
                BYTES * per_token,
                BYTES * per_token * TOKENS / 1e12,
            )
        )
    names = ["site", "default model", "70 B", "70 B, bytes a token", "the corpus, TB a layer"]
    return pd.DataFrame(rows, columns=names)


def forecast(lm: hk.LM, found: dict[str, float]) -> pd.DataFrame:
    """Returns the hours of each part of the work alone, on 8 and 64 GPUs."""
    weights = sum(weight.numel() for weight in lm.model.parameters())
    node, writer = (
        int(ASSUMED["GPUs of a node"]),
        found["bytes a second of one writer, sha256 and fsync"],
    )
    speed = ASSUMED["a GPU, bfloat16, FLOP/s"] * ASSUMED["share of it that a forward reaches"]
    rows = []
    for gpus in (node, 8 * node):
        nodes = gpus // node
        for label, (site, layer, layers) in KEPT.items():
            share = (layer + 1) / lm.n_layers  # the forward ends after the last site
            size = numbers(lm, site, layer) * BYTES * TOKENS * layers
            split = site in ("z", "mlp_post", "pattern")
            parts = {
                "forwards": 2 * weights * share * TOKENS / (speed * gpus),
                "putting together": size
                * split
                / (ASSUMED["between GPUs of a node, bytes/s"] * nodes),
                "one writer": size / writer,
                "to one node": size * (nodes > 1) / ASSUMED["between nodes, bytes/s for each node"],
                "disks of every node": size / (ASSUMED["disks of a node, bytes/s"] * nodes),
            }
            hours = {name: seconds / 3600 for name, seconds in parts.items()}
            spread = {
                name: hours[name]
                for name in ("forwards", "putting together", "disks of every node")
            }
            row = {"gpus": gpus, "kept": label, "terabytes": size / 1e12, **hours}
            row |= {
                "slowest": max(hours, key=hours.__getitem__),
                "slowest, a writer a node": max(spread, key=spread.__getitem__),
            }
            rows.append(row)
    return pd.DataFrame(rows)


# ---- the page


def markdown(table: pd.DataFrame) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(map(str, table.columns)), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(cell(value) for value in row) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def plan(measured: pd.DataFrame, table: pd.DataFrame, found: dict[str, float]) -> str:
    at: dict[tuple[int, str], Any] = {
        (row["gpus"], row["kept"]): row for row in table.to_dict("records")
    }
    few, many = at[8, "resid_post.40"], at[64, "resid_post.40"]
    assumed = pd.DataFrame(
        {"what": list(ASSUMED), "value": [float(value) for value in ASSUMED.values()]}
    )
    sweep = sweeping()
    template = Path(__file__).with_name("scale_plan.md").read_text(encoding="utf-8")
    return template.format(
        question=QUESTION,
        measured=markdown(measured),
        assumed=markdown(assumed),
        forecast=markdown(table),
        hours_few=few["forwards"],
        hours_many=many["forwards"],
        terabytes=few["terabytes"],
        writer_few=few["one writer"],
        writer_many=many["one writer"],
        rate_few=few["terabytes"] * 1e12 / (few["forwards"] * 3600) / 1e6,
        rate_many=many["terabytes"] * 1e12 / (many["forwards"] * 3600) / 1e6,
        writer=found["bytes a second of one writer, sha256 and fsync"] / 1e6,
        all_layers=at[64, "resid_post, all layers"]["terabytes"] / 1000,
        all_disks=at[64, "resid_post, all layers"]["disks of every node"],
        all_forwards=at[64, "resid_post, all layers"]["forwards"],
        pattern=at[64, "pattern.40"]["terabytes"] / 1000,
        unit=found["seconds of a unit of Ray beside its work, and of starting an actor"] * 1000,
        small=found["seconds to put a small tensor together, two processes"] * 1e6,
        context=CONTEXT,
        short=many["one writer"] / many["forwards"],
        **sweep,
    )


def sweeping() -> dict[str, float]:
    """Returns layer-tokens and GPU hours of a sweep over 1,000 prompts of 100 tokens."""
    layers, width, prompts = SHAPE["num_hidden_layers"], 100, 1000
    naive = layers * width * prompts * layers * width
    # A cell starts at its layer and position: half of the layers, half of the positions
    planned = naive / 4
    flops = 2 * 70e9 / layers
    speed = ASSUMED["a GPU, bfloat16, FLOP/s"] * ASSUMED["share of it that a forward reaches"]
    return {
        "naive_hours": naive * flops / speed / 3600,
        "planned_hours": planned * flops / speed / 3600,
    }


if __name__ == "__main__":
    gather(Path(sys.argv[2])) if "--gather" in sys.argv else main()
