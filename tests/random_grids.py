"""Random grids: every cell of a sweep against a forward with the same hooks, the errors too.

    python tests/random_grids.py --count 2000 --seed 1                # prints each difference, as a grid to run

Forwards themselves are held by random_programs.py. Here hooks are drawn from more than what is written by hand there:
functions that look from one position at another, sites inside experts and attention, any module, and hooks that are
wrong.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from random_programs import FUNCTIONS, TOLERANCE, Draws, V, code, made
from tiny_families import PROGRAMMED
from torch import Tensor

import hookkit as hk


def summed(x: Tensor) -> Tensor:
    """Each position with all before it."""
    return x.cumsum(1)


def from_first(x: Tensor) -> Tensor:
    return x - x[:, :1]


def nothing(x: Tensor) -> None:
    return None


def cut_off(x: Tensor) -> Tensor:
    return x[..., :1]


def asks(logits: Tensor, here: Any) -> Tensor:
    return logits[..., 5] > 0


NAMES = {
    function.__name__: function for function in (summed, from_first, nothing, cut_off, asks)
} | FUNCTIONS
METRICS = [hk.metrics.logit(7), hk.metrics.logprob(11)]


class Grid(Draws):
    """Draws a grid: prompts, hooks under every cell, and cells, each as Python."""

    def draw(self) -> dict[str, Any]:
        chance = self.chance
        lengths = [chance.randint(2, 9) for _ in range(chance.choice([1, 2, 2, 3]))]
        lengths = lengths[:1] * len(lengths) if chance.random() < 0.3 else lengths
        self.prompts = [self.tokens(length) for length in lengths]
        self.way, self.generating = "sweep", False
        return {
            "prompts": self.prompts,
            "pos": chance.choice([-1, -1, -1, 0, -min(lengths), min(lengths) - 1, -2]),
            "memory": chance.choice([None, None, None, 1, 50_000, 200_000]),
            "base_hooks": self.hooks(chance.choice([0, 0, 0, 1, 2])),
            "cells": [self.hooks(chance.choice([1, 1, 2, 3])) for _ in range(chance.randint(1, 5))],
        }

    def hooks(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            if self.chance.random() < 0.4:
                found.append(self.more())
            elif (act := self.act(False)) is not None:
                found.append(code(act))
        return found

    def more(self) -> str:
        """A hook that is not among those written by hand."""
        chance, lm = self.chance, self.lm
        pos = chance.choice(
            [
                "",
                "",
                ", pos=-1",
                ", pos=0",
                ", pos=[0, -1]",
                ", pos=slice(1, None)",
                ", pos=slice(0, 2)",
            ]
        )
        kind = chance.choice(
            ["together", "together", "together", "when", "module", "module", "inside", "wrong"]
        )
        if kind == "when":
            return f"hk.{chance.choice(['force(5', 'ban(7', 'boost(7, by=2.0'])}, when=asks{pos})"
        if kind == "module":
            path = chance.choice([name for name, module in lm.root.named_modules() if name])
            side = chance.choice(["input", "output"])
            verb = chance.choice(
                ["scale({}, 0.5{})", "edit({}, tanh{})", "edit({}, summed{})", "ablate({}{})"]
            )
            return f"hk.{verb}".format(f"hk.module({path!r}, side={side!r})", pos)
        if kind == "inside":
            names = [
                "router_logits",
                "experts",
                "expert_weights",
                "scores",
                "pattern",
                "q_rot",
                "k_rot",
                "v",
            ]
            names = [name for name in names if lm.layout.layers(name)]
            if names:
                name = chance.choice(names)
                place = f"{name}.{chance.choice(lm.layout.layers(name))}"
                return f"hk.{chance.choice(['scale({!r}, 0.5{})', 'ablate({!r}{})', 'edit({!r}, affine{})'])}".format(
                    place, pos
                )
        names = [name for name in lm.layout.names if name not in ("experts", "scores", "pattern")]
        name = chance.choice([*names, "logits", "lm_head", "embed"])
        layers = lm.layout.layers(name)
        place = f"{name}.{chance.choice(layers)}" if layers else name
        if kind == "wrong" and chance.random() < 0.5:
            wrong = [
                ", pos=99",
                ", pos=-99",
                ", rows=[9]",
                ", pos=slice(50, None)",
                ", pos=1",
                ", rows=[0]",
            ]
            return f"hk.edit({place!r}, {chance.choice(['nothing', 'cut_off', 'tanh', 'tanh'])}{chance.choice(wrong)})"
        return f"hk.edit({place!r}, {chance.choice(['summed', 'from_first'])}{pos})"


def made_of(lm: hk.LM, words: Sequence[str]) -> list[hk.types.Hook]:
    def ran(prompts: list[list[int]], site: str) -> hk.types.Run:
        return hk.forward(lm, prompts, hk.capture(site), logits=False)

    return [
        eval(each, {"hk": hk, "V": V, "math": __import__("math"), "ran": ran, **NAMES})
        for each in words
    ]


def by_forward(
    lm: hk.LM, grid: dict[str, Any], cell: Sequence[str]
) -> list[list[float]] | Exception:
    """The metrics of each prompt in a forward with the hooks of a cell, or what it raises."""
    try:
        run = hk.forward(lm, grid["prompts"], *made_of(lm, grid["base_hooks"]), *made_of(lm, cell))
    except Exception as error:  # noqa: BLE001  whatever it is, the sweep has to raise it too
        return error
    found = []
    for row, ids in enumerate(grid["prompts"]):
        place = grid["pos"] if grid["pos"] >= 0 else len(ids) + grid["pos"]
        logits = run.logits[row, place].double()
        found.append([float(logits[7]), float(logits.log_softmax(-1)[11])])
    return found


def by_sweep(lm: hk.LM, grid: dict[str, Any], cells: Sequence[Sequence[str]]) -> Any:
    """The metrics [cell][prompt], or what the sweep raises."""
    try:
        hooks = [made_of(lm, cell) for cell in cells]
        table = hk.sweep(
            lm, grid["prompts"], {"cell": range(len(cells))}, lambda cell: hooks[cell], METRICS,
            base_hooks=made_of(lm, grid["base_hooks"]), pos=grid["pos"], memory=grid["memory"], progress=False,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001
        return error
    count = len(grid["prompts"])
    values = table[["logit", "logprob"]].to_numpy().tolist()
    return [values[start : start + count] for start in range(0, len(values), count)]


def differs(mine: Any, wanted: Any) -> str:
    """How one cell differs from its forward."""
    if isinstance(wanted, Exception) or isinstance(mine, Exception):
        same = type(mine) is type(wanted)
        return (
            ""
            if same
            else f"{type(mine).__name__}: {mine}\n    forward: {type(wanted).__name__}: {wanted}"
        )
    for row, (one, two) in enumerate(zip(mine, wanted, strict=True)):
        for now, was in zip(one, two, strict=True):
            same = (
                now == was
                or abs(now - was) <= TOLERANCE * max(1.0, abs(was))
                or (now != now and was != was)
            )
            if not same:
                return f"row {row}: {now:.6g}, forward {was:.6g}"
    return ""


def grid_differences(lm: hk.LM, grid: dict[str, Any]) -> list[str]:
    """Each cell that differs from its forward: all cells in one sweep, or by itself where a forward raises."""
    wanted = [by_forward(lm, grid, cell) for cell in grid["cells"]]
    together = [n for n, each in enumerate(wanted) if not isinstance(each, Exception)]
    mine: list[Any] = [None] * len(wanted)
    for alone in (n for n in range(len(wanted)) if n not in together):
        found = by_sweep(lm, grid, [grid["cells"][alone]])
        mine[alone] = found if isinstance(found, Exception) else found[0]
    if together:
        found = by_sweep(lm, grid, [grid["cells"][n] for n in together])
        for place, n in enumerate(together):
            mine[n] = found if isinstance(found, Exception) else found[place]
    found = []
    for cell, one, two in zip(grid["cells"], mine, wanted, strict=True):
        if words := differs(one, two):
            found.append(
                f"{words}\n    cell [{', '.join(cell)}]\n    under [{', '.join(grid['base_hooks'])}]"
            )
    return found


def differences(family: str, seeds: Sequence[int]) -> list[str]:
    """Every difference of these grids of a family."""
    lm = made(family)
    found = []
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grid = Grid(family, lm, seed, ("forward",)).draw()
            words = {name: grid[name] for name in ("prompts", "pos", "memory")}
            found += [f"{family} {seed} {words}\n    {each}" for each in grid_differences(lm, grid)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", nargs="*", default=PROGRAMMED)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started, total, each = time.time(), 0, -(-asked.count // len(asked.families))
    for family in asked.families:
        found = differences(family, range(asked.seed * 100_000, asked.seed * 100_000 + each))
        total += len(found)
        for words in found:
            print(f"---- {words}\n", flush=True)
        print(
            f"{family}: {each} grids, {len(found)} cells differ ({time.time() - started:.0f} s)",
            flush=True,
        )
    print(f"{each * len(asked.families)} grids, {total} cells differ", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
