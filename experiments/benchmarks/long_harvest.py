"""Does a corpus of any length fit?

Yes, if memory from a tenth of the way to the end stays the same to 5 %.

Two million tokens of text from a generator, which are never in memory together: harvested, summed
up by hk.stats.activation_statistics without a harvest, and read again from the disk, in order and
shuffled. A random model of 3 blocks gives the numbers, since memory is what counts here and not
what they are; the default model runs over a part of the text beside it. What is sampled, whenever a
text or a batch is taken, is the memory of the whole process (RSS), and its own part of it,
without pages of files that are mapped, which the system takes back when it needs them.

python -m experiments.benchmarks.long_harvest
    eleven minutes; writes results/benchmarks_long_harvest/
"""

import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import INK, LINES, MUTED, apply_style

TEXTS, SOME = 16_400, 240  # of about 123 tokens each; those of the default model
SHARD, SOME_SHARD = 20_000, 2_000  # rows: 2.5 MB of the small model, 4.6 MB of the default one
ALIKE, BEGUN = 0.05, 0.1  # how much memory may differ, from which part of the way on
SAMPLES = 200
WHO, DOES = (
    ("Mary", "John", "The cook", "A child", "My friend"),
    ("likes", "takes", "never has", "asks for", "sells"),
)
WHAT, WHERE = (
    ("tea", "coffee", "oat milk", "warm bread", "cocoa"),
    ("in the garden", "at noon", "by the sea", "alone"),
)
Item = TypeVar("Item")
QUESTION = "Does a corpus of any length fit?"


def main() -> None:
    torch.set_num_threads(2)
    default = hk.load(device="cpu")
    small = hk.tiny(
        "llama",
        tokenizer=default.tokenizer,
        config={"vocab_size": 49152, "max_position_embeddings": 512},
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        hk.record(
            "results/benchmarks_long_harvest", title="Memory over a long corpus", lm=default, seed=0
        ) as results,
    ):
        ways = [*measured(small, default, Path(folder))]
        table = results.table(
            "memory", pd.DataFrame([way.summary() for way in ways]), caption=CAPTION
        )
        results.answer(answer({"memory": table}))
        samples = pd.concat([way.table() for way in ways], ignore_index=True)
        results.table("samples", samples, caption="Every sample.")
        results.figure(
            "memory_figure",
            drawn(table, samples),
            caption="The largest less the smallest memory after the first tenth, as a part of it.",
        )
    print(table.round(3).to_string(index=False))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    table = tables["memory"]
    longest = table.loc[table["tokens"].idxmax()]
    verdict = "Yes" if table["constant"].all() else "Not in every way"
    return (
        f"{verdict}: over {longest['tokens'] / 1e6:.2g} million tokens the memory of the process "
        f"stays the same to {ALIKE:.0%} in {table['constant'].sum()} of {len(table)} ways to "
        f"write, sum up and read a harvest. While {longest['tokens'] / 1e6:.2g} million tokens are "
        f"harvested, it is {longest['rss_mb']:.0f} MB and differs by {longest['rss_apart']:.1%} at "
        "most."
    )


CAPTION = (
    "rss_mb: the median from a tenth of the way to the end; rss_apart: the largest less the "
    "smallest there, as a part of it; own_: without the pages of files that are mapped. constant: "
    "rss_apart, or own_apart for the shuffled pass, which has all files open, is under 5 %."
)


@dataclass(eq=False)
class Way:
    """One pass, and the memory on its way: (part of the way, RSS, own part of it), in MB."""

    task: str
    count: int  # steps of the pass
    mapped: bool = False  # True where it opens all of a harvest's files at once
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    tokens: int = 0

    def watched(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, while memory is looked at some times on the way."""
        every = max(1, self.count // SAMPLES)
        for number, item in enumerate(items):
            if number % every == 0:
                self.samples.append((number / self.count, resident("VmRSS"), resident("RssAnon")))
            yield item

    def table(self) -> pd.DataFrame:
        found = pd.DataFrame(self.samples, columns=["part", "rss_mb", "own_mb"])
        found.insert(0, "task", self.task)
        return found

    def summary(self) -> dict[str, object]:
        late = self.table().query(f"part >= {BEGUN}")
        said: dict[str, object] = {"task": self.task, "tokens": self.tokens}
        for name in ("rss", "own"):
            values = late[f"{name}_mb"]
            said |= {
                f"{name}_mb": values.median(),
                f"{name}_apart": (values.max() - values.min()) / values.median(),
            }
        return said | {"constant": said["own_apart" if self.mapped else "rss_apart"] < ALIKE}  # pyright: ignore


def measured(small: hk.LM, default: hk.LM, folder: Path) -> Iterator[Way]:
    way = Way("harvest", TEXTS)
    made = hk.harvest(
        small,
        way.watched(texts(TEXTS)),
        "resid_post.1",
        folder / "small",
        shard_size=SHARD,
        progress=False,
    )
    way.tokens = tokens = len(made)
    yield way
    way = Way("statistics, no harvest", TEXTS, tokens=tokens)
    hk.stats.activation_statistics(
        small, way.watched(texts(TEXTS)), "resid_post.1", covariance=True, top=10, progress=False
    )
    yield way
    for task, seed in (("read in order", None), ("read shuffled", 0)):
        harvest = hk.open_harvest(folder / "small")
        way = Way(task, tokens // 4096, mapped=seed is not None, tokens=tokens)
        for _ in way.watched(harvest.batches(4096, seed=seed, drop_last=True)):
            pass
        yield way
    way = Way("harvest, default model", SOME)
    options = {"shard_size": SOME_SHARD, "batch_tokens": 1024, "progress": False}
    made = hk.harvest(
        default, way.watched(texts(SOME)), "resid_post.5", folder / "default", **options
    )
    way.tokens = len(made)
    yield way


def texts(count: int) -> Iterator[str]:
    """Texts of 16 sentences, drawn one after the other."""
    draw = random.Random(0).choice
    for _ in range(count):
        yield " ".join(f"{draw(WHO)} {draw(DOES)} {draw(WHAT)} {draw(WHERE)}." for _ in range(16))


def resident(word: str) -> float:
    """Memory of this process in MB, from the line of /proc that begins with a word."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(word)) * 1024 / 1e6


def drawn(memory: Any, samples: Any) -> Figure:
    """Draws memory along the way, a panel per pass: its own part, and all with mapped files."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    for panel, way in zip(axes, memory.to_dict("records"), strict=False):
        table = samples[samples["task"] == way["task"]]
        own = {"color": LINES[0], "alpha": 0.35, "lw": 0, "label": "the process's own memory"}
        panel.fill_between(table["part"], table["own_mb"], **own)
        panel.plot(table["part"], table["rss_mb"], color=LINES[1], label="with mapped files")
        panel.axvspan(0, BEGUN, color=MUTED, alpha=0.18, lw=0, label="does not count")
        panel.set_title(f"{way['task']}: {way['tokens'] / 1e6:.3g} M tokens", fontsize=9, color=INK)
        words = f"largest − smallest: {way['rss_apart']:.1%}"
        panel.text(0.97, 0.05, words, transform=panel.transAxes, ha="right", fontsize=8, color=INK)
    for unused in axes[len(memory) :]:
        unused.set_axis_off()
    handles = axes[0].get_legend_handles_labels()
    axes[-1].legend(*handles, frameon=False, fontsize=9, labelcolor=INK, loc="center")
    axes[0].set_ylim(bottom=0)
    figure.supxlabel("part of the texts, or batches, that were taken", size=9, color=INK)
    figure.supylabel("memory of the process (MB)", size=9, color=INK)
    return apply_style(figure, "Memory does not grow with the length of a corpus")


if __name__ == "__main__":
    main()
