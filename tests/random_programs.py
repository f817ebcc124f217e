"""Random programs: hooks of every verb, on every family, in every way to run a model, against plain transformers.

    python tests/random_programs.py --count 10000 --seed 1            # prints each difference, as a program to run
    python tests/random_programs.py --count 200 --families llama gpt2 --ways generate sweep

A program is a family, some prompts, some hooks, and a way to run them: `hk.forward`, `hk.attach` with a call of the
model, `hk.generate`, or `hk.sweep`. What comes out is held against whole forwards of each prompt alone, without a cache
and without hookkit, with hooks written by hand (by_hand_programs.py). A program that differs is made smaller, as long as
it still differs, and printed.
"""

import argparse
import copy
import dataclasses
import itertools
import math
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from by_hand_programs import HEADED, INSIDE, Act, Hand, boundary, site_values
from tiny_families import PROGRAMMED, made
from torch import Tensor

import hookkit as hk
from hookkit.errors import BadEdit

NAMES = PROGRAMMED
WAYS = ("forward", "attach", "generate", "sweep")
TOLERANCE = 3e-4  # of the largest value, in float32
STEPS = 4
REFUSED = (
    "leaves no token to choose",
    " cannot be",
    "has no answer at",
    "NaN",
)  # hooks against one another
HEAD = ("lm_head", "logits")
CONDITIONS = (
    "entropy_above",
    "entropy_below",
    "margin_above",
    "margin_below",
    "rank_at_most",
    "rank_at_least",
)
CONDITIONS += ("prob_at_most", "prob_at_least")
FOR_TOKENS = ("force", "ban", "boost", "restrict", "cap", "swap", "set_rank")


class Unstable(Exception):
    """A program whose outcome hangs on the last digits: two numbers that decide something are nearly equal."""


def V(seed: int, *shape: int) -> Tensor:
    """A random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tanh(x: Tensor) -> Tensor:
    return 4 * torch.tanh(
        x / 8
    )  # which numbers of this size do not fill: equal logits are drawn by rounding


def affine(x: Tensor) -> Tensor:
    return x * 0.7 + 0.1


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1)


def in_place(x: Tensor) -> Tensor:
    x *= 0.5
    return x


def strided(x: Tensor) -> Tensor:
    """Numbers that do not lie in the order of the axes."""
    return (x * 0.9).transpose(0, 1).contiguous().transpose(0, 1)


FUNCTIONS = {function.__name__: function for function in (tanh, affine, flipped, in_place, strided)}


# ---- what a program is


@dataclass
class Program:
    """A program in words."""

    family: str
    seed: int
    way: str
    prompts: list[list[int]]
    acts: list[Act]
    options: dict[str, Any] = field(default_factory=dict)
    cells: list[list[Act]] = field(
        default_factory=list
    )  # of a sweep; `acts` are those under every cell

    def source(self) -> str:
        """The program as Python."""
        lines = [f"# family {self.family!r}, seed {self.seed}, {self.options}"]
        lines += [f"prompts = {self.prompts}"]
        lines += [f"hooks = [{', '.join(map(code, self.acts))}]"]
        lines += [f"cell{n} = [{', '.join(map(code, cell))}]" for n, cell in enumerate(self.cells)]
        return "\n".join([*lines, f"# {self.way}"])


def code(act: Act) -> str:
    """The call of hookkit that makes a hook."""
    values, place, where = act.values, repr(act.place), _where(act)
    if act.verb in FOR_TOKENS:
        return f"hk.{act.verb}({_of_tokens(act)})"
    words = {
        "capture": lambda: f"hk.capture({place}, name={act.name!r}{where})",
        "edit": lambda: f"hk.edit({place}, {values['function'].__name__}{where})",
        "zero": lambda: f"hk.ablate({place}{_units(values)}{where})",
        "tensor": lambda: f"hk.ablate({place}, to={values['code']}{_units(values)}{where})",
        "reference": lambda: f"{values['code'].replace('PLACE', place)}{_units(values)}{where})",
        "steer": lambda: f"hk.steer({place}, {values['code']}, scale={values['scale']}{where})",
        "scale": lambda: f"hk.scale({place}, {values['factor']}{where})",
        "project_out": lambda: f"hk.project_out({place}, {values['code']}{where})",
        "skip_block": lambda: f"hk.skip_block({act.layer}{where})",
        "knockout": lambda: _knockout(act, where),
    }
    return words[act.verb]()


def _knockout(act: Act, where: str) -> str:
    return f"hk.knockout({act.layer}, {act.head}, key={act.values['key']}{where.replace(' pos=', ' query=')})"


def _of_tokens(act: Act) -> str:
    """What a verb that names tokens is given."""
    values, where = act.values, _where(act)
    tokens, phrase = values["tokens"], f"hk.word({values['tokens']})"
    if act.verb == "force" and len(tokens) > 1:
        rows = "" if act.rows is None else f", rows={act.rows}"
        where = f", step={values['start']}{rows}"
    where = f"{_when(values)}{where}" + ("" if act.site == "logits" else f", site={act.site!r}")
    limit = "logit" if values.get("logit") is not None else "prob"
    margin = "math.inf" if values.get("margin") == math.inf else values.get("margin")
    words = {
        "force": lambda: f"{phrase if len(tokens) > 1 else tokens[0]}, margin={margin}",
        "ban": lambda: phrase if values.get("phrase") else str(tokens),
        "boost": lambda: f"by={dict(zip(tokens, values['by'], strict=True))}",
        "restrict": lambda: str(tokens),
        "cap": lambda: f"{tokens}, {limit}={values[limit]}",
        "swap": lambda: f"{tokens[0]}, {tokens[1]}",
        "set_rank": lambda: f"{tokens[0]}, {values['rank']}",
    }
    return words[act.verb]() + where


def _where(act: Act) -> str:
    words = ""
    if act.pos is not None:
        pos = f"hk.{act.pos}" if isinstance(act.pos, str) else repr(act.pos)
        words += f", pos={pos}"
    words += "" if act.rows is None else f", rows={act.rows}"
    return words + ("" if act.step is None else f", step={act.step!r}")


def _units(values: dict[str, Any]) -> str:
    return "" if values.get("units") is None else f", units={values['units']}"


def _when(values: dict[str, Any]) -> str:
    if values.get("when") is None:
        return ""
    kind, token, limit = values["when"]
    if token is None:
        return f", when=hk.when.{kind}({limit})"
    quantity, compare = kind.split("_", 1)
    return f", when=hk.when.{quantity}_of({token}, {compare}={limit})"


def hooks_of(lm: hk.LM, acts: Sequence[Act]) -> list[hk.types.Hook]:
    """The hooks of hookkit."""

    def ran(prompts: list[list[int]], site: str) -> hk.types.Run:
        return hk.forward(lm, prompts, hk.capture(site), logits=False)

    names = {"hk": hk, "V": V, "math": math, "ran": ran, **FUNCTIONS}
    return [eval(code(act), names) for act in acts]


# ---- drawing programs


class Draws:
    """Draws a program of a family."""

    def __init__(self, family: str, lm: hk.LM, seed: int, ways: Sequence[str]) -> None:
        self.family, self.lm, self.model = family, lm, lm.model
        self.chance = random.Random(f"{family} {seed}")
        self.seed, self.ways = seed, ways

    def program(self) -> Program:
        chance = self.chance
        way = chance.choice(self.ways)
        count = chance.choice([1, 1, 2, 2, 3])
        lengths = [chance.randint(3, 9) for _ in range(count)]
        if chance.random() < 0.3:
            lengths = lengths[:1] * count
        self.prompts = [self.tokens(length) for length in lengths]
        self.way, self.generating = way, way == "generate"
        program = Program(self.family, self.seed, way, self.prompts, [])
        if way == "sweep":
            program.acts = self.acts(chance.choice([0, 0, 1, 2]))
            program.cells = [
                self.acts(chance.choice([1, 1, 2, 3])) for _ in range(chance.randint(1, 4))
            ]
            program.options = {"pos": chance.choice([-1, -1, -1, 0, -min(lengths), -2])}
            program.options |= {"memory": 100_000} if chance.random() < 0.2 else {}
            return program
        program.acts = self.acts(chance.choice([1, 2, 2, 3, 4, 5]), captures=True)
        program.options = getattr(self, f"_{way}")(program.acts)
        return program

    def _forward(self, acts: Sequence[Act]) -> dict[str, Any]:
        if not any(act.site in HEAD for act in acts):
            return {"logits": self.chance.choice(["all", "all", "last", False])}
        last = all(
            act.pos == -1 or (act.pos is None and act.verb in FOR_TOKENS)
            for act in acts
            if act.site in HEAD
        )
        return {"logits": self.chance.choice(["all", "last"] if last else ["all"])}

    def _attach(self, acts: Sequence[Act]) -> dict[str, Any]:
        return {"side": self.chance.choice(["left", "right"])}

    def _generate(self, acts: Sequence[Act]) -> dict[str, Any]:
        chance = self.chance
        options: dict[str, Any] = {"max_new_tokens": STEPS, "eos_token_id": None}
        mode = chance.choice(["greedy", "greedy", "greedy", "sampling", "beams"])
        if mode == "beams":
            options |= {"num_beams": chance.choice([2, 3]), "do_sample": False}
        elif mode == "sampling":
            options |= {"do_sample": True, "temperature": chance.choice([0.7, 1.0, 3.0])}
            options |= {"top_k": chance.choice([0, 5, 50]), "seed": chance.randint(0, 99)}
        else:
            options |= {"do_sample": False}
        if chance.random() < 0.25:
            options |= {"use_cache": False}
        elif chance.random() < 0.3 and not self.family.startswith(
            ("mamba", "mpt")
        ):  # which have no cache
            options |= {"prefill_chunk_size": chance.choice([1, 2, 3])}
        options["logits"] = chance.choice(["all", "all", "last"])
        return options

    def tokens(self, count: int) -> list[int]:
        return [self.chance.randrange(3, 320) for _ in range(count)]

    def acts(self, count: int, *, captures: bool = False) -> list[Act]:
        found: list[Act] = []
        while len(found) < count:
            act = self.act(captures)
            if act is not None:
                act.name = f"c{len(found)}"
                found.append(act)
        return found

    def act(self, captures: bool) -> Act | None:
        chance = self.chance
        kind = chance.choices(["capture", "inner", "tokens", "attention"], [2 * captures, 6, 4, 1])[
            0
        ]
        if kind == "tokens":
            return self.of_tokens()
        if kind == "attention":
            return self.of_attention()
        site = self.site()
        if site is None:
            return None
        if kind == "capture":
            return self.placed(Act("capture", *site))
        return self.inner(*site)

    def site(self) -> tuple[str, int | None, int | None] | None:
        """A site that the model has and that can be changed by hand."""
        chance, lm = self.chance, self.lm
        names = [
            name
            for name in lm.layout.names
            if name not in ("experts", "expert_weights", "router_logits")
        ]
        name = chance.choice([name for name in names if name not in (*INSIDE, "scores")])
        layers = lm.layout.layers(name)
        layer = chance.choice(layers) if layers else None
        if boundary(self.model, "attn_out" if name == "resid_mid" else name, layer) is None:
            return None
        return name, layer, self.head(name, layer)

    def head(self, name: str, layer: int | None) -> int | None:
        if name not in HEADED or self.chance.random() < 0.5:
            return None
        sizes = self.lm.layout.sizes_of(layer)
        return self.chance.randrange(sizes["kv_head" if name in ("k", "v", "k_rot") else "head"])

    def placed(self, act: Act) -> Act:
        """An act at some positions of some rows."""
        chance = self.chance
        if (
            self.generating and act.site in HEAD
        ):  # the logits before the prompt's last are not computed there
            if act.verb in ("capture", "edit"):
                act.step = chance.choice([0, [1, 2], slice(0, None)])
            else:
                act.pos = chance.choice([-1, "GENERATED", slice(-1, None)])
            return act
        if len(self.prompts) > 1 and chance.random() < 0.3:
            rows = range(len(self.prompts))
            act.rows = sorted(chance.sample(rows, chance.randint(1, len(rows) - 1)))
        length = min(len(self.prompts[row]) for row in act.rows or range(len(self.prompts)))
        ways = ["all", "all", "one", "one", "list", "slice", "PROMPT"]
        ways += ["GENERATED", "later"] if self.generating else []
        match chance.choice(ways):
            case "one":
                act.pos = chance.randrange(-length, length)
            case "list":
                act.pos = sorted(chance.sample(range(length), chance.randint(1, length)))
                chance.shuffle(act.pos)
            case "slice":
                start, stop = sorted(chance.sample(range(length + 1), 2))
                start = start - length if chance.random() < 0.3 and start < length else start
                act.pos = slice(
                    start, None if chance.random() < 0.4 else stop, chance.choice([None, None, 2])
                )
                if act.pos.stop is not None and act.pos.start < 0:
                    act.pos = slice(act.pos.start, None)
            case "PROMPT" | "GENERATED" as part:
                act.pos = part
            case "later":
                longest = max(
                    len(self.prompts[row]) for row in act.rows or range(len(self.prompts))
                )
                act.pos = slice(longest, None) if longest < length + STEPS - 1 else "GENERATED"
        return act

    def shape(self, act: Act) -> list[int]:
        site = hk.Site(act.site, act.layer, act.head)
        return list(self.lm.shape(site))

    def inner(self, name: str, layer: int | None, head: int | None) -> Act:
        """An act on inner values, or on logits as if they were such."""
        chance = self.chance
        if name == "resid_post" and chance.random() < 0.15:
            return self.placed(Act("skip_block", name, layer))
        verbs = [
            "edit",
            "zero",
            "tensor",
            "reference",
            "reference",
            "steer",
            "scale",
            "project_out",
        ]
        act = self.placed(Act(chance.choice(verbs), name, layer, head))
        shape, seed = self.shape(act), chance.randrange(10**6)
        several = isinstance(act.pos, list) and chance.random() < 0.5
        values = act.values
        match act.verb:
            case "edit":
                values["function"] = chance.choice(list(FUNCTIONS.values()))
            case "zero" | "tensor" | "steer":
                wide = [len(act.pos), *shape] if several else shape
                values |= {
                    "vector": V(seed, *wide),
                    "code": f"V({seed}, {', '.join(map(str, wide))})",
                }
                values["scale"] = chance.choice([1.0, -2.0, 0.5])
            case "scale":
                values["factor"] = chance.choice([0.0, 0.5, -1.0, 1.7])
            case "project_out":
                wide = [2, shape[-1]] if chance.random() < 0.3 else [shape[-1]]
                values |= {
                    "vector": V(seed, *wide),
                    "code": f"V({seed}, {', '.join(map(str, wide))})",
                }
            case "reference":
                self.reference(act)
        if act.verb in ("zero", "tensor", "reference") and chance.random() < 0.3:
            values["units"] = sorted(chance.sample(range(shape[-1]), 3))
        return act

    def reference(self, act: Act) -> None:
        """Values of other prompts: patched in, or their mean, or the one that a draw among one finds."""
        chance = self.chance
        lengths = [len(prompt) for prompt in self.prompts]
        how = chance.choice(["patch", "mean", "resample"])
        if how == "patch":
            if act.pos in ("PROMPT", "GENERATED") or (
                isinstance(act.pos, slice) and act.pos.stop is None
            ):
                act.pos = -1
            count = 1 if len(set(lengths)) == 1 and chance.random() < 0.5 else len(lengths)
            prompts = [self.tokens(length) for length in lengths[:count]]
            act.values["code"] = f"hk.patch(PLACE, ran({prompts}, PLACE)"
            if act.pos is None:
                act.pos = "PROMPT"
        else:
            per = chance.choice(["position", "all"]) if how == "mean" else "position"
            prompts = [
                self.tokens(max(lengths) + STEPS + 2) for _ in range(1 if how == "resample" else 2)
            ]
            if how == "mean" and chance.random() < 0.5:
                prompts[1] = prompts[1][: max(lengths) // 2]
            act.values |= {"per": per}
            act.values["code"] = f"hk.ablate(PLACE, to={how!r}, over={prompts}, per={per!r}"
        act.values["patch"] = how == "patch"
        act.values["runs"] = [
            site_values(self.model, prompt, act.site, act.layer, act.head) for prompt in prompts
        ]

    def of_attention(self) -> Act | None:
        """A knockout, or something at what the modelling file's own attention is given or gives."""
        chance, lm = self.chance, self.lm
        layers = lm.layout.layers("pattern")
        if (
            not layers
            or lm.family.attention != "interface"
            or (self.way == "sweep" and chance.random() < 0.3)
        ):
            return None
        layer = chance.choice(layers)
        head = self.head("pattern", layer)
        shortest = min(map(len, self.prompts))
        verb = chance.choice(["knockout", "pattern", "q_rot", "k_rot"])
        if verb == "knockout":
            key = chance.randrange(shortest - 1)
            act = Act(
                "knockout", "scores", layer, head, pos=slice(key + 1, None), values={"key": key}
            )
            if chance.random() < 0.4:
                act.pos = chance.randrange(key + 1, shortest)
            return act
        if verb not in lm.layout.names:
            return None
        act = self.placed(Act("scale", verb, layer, self.head(verb, layer)))
        if verb == "pattern" and self.way != "sweep" and chance.random() < 0.3:
            act.verb = "capture"
            return act
        act.values["factor"] = chance.choice([0.0, 0.5, 2.0])
        return act

    def of_tokens(self) -> Act:
        """An act on the logits of tokens."""
        chance = self.chance
        act = Act(
            chance.choice(FOR_TOKENS), chance.choice(["logits", "logits", "logits", "lm_head"])
        )
        tokens = chance.sample(range(3, 320), chance.randint(2, 4))
        act.values = {"tokens": tokens, "at_steps": True} | self.amounts(act.verb, tokens)
        phrases = "start" in act.values or "phrase" in act.values
        if not phrases and chance.random() < 0.3:
            act.values["when"] = self.condition()
        if "start" in act.values:
            act.step = list(range(act.values["start"], act.values["start"] + len(tokens)))
        elif self.generating and chance.random() < 0.5:
            act.step = chance.choice([0, 1, [0, 2], slice(1, None), slice(0, 2)])
        elif chance.random() < 0.3:
            act.pos = -1 if self.generating else chance.choice([-1, None, slice(-2, None)])
        if len(self.prompts) > 1 and chance.random() < 0.2:
            act.rows = [chance.randrange(len(self.prompts))]
        return act

    def amounts(self, verb: str, tokens: list[int]) -> dict[str, Any]:
        """What a verb on tokens is given beside them, or other tokens."""
        chance = self.chance
        writes = self.generating and chance.random() < 0.3
        phrase = (
            {"tokens": tokens, "start": chance.randint(0, STEPS - len(tokens))}
            if writes
            else {"tokens": tokens[:1]}
        )
        banned = {"phrase": True, "tokens": [chance.choice(self.prompts)[-1], tokens[0]]}
        more = list(dict.fromkeys(tokens + chance.sample(range(3, 320), 3)))
        low = {"logit": round(chance.uniform(-2, 3), 3)}
        rare = {"prob": round(chance.uniform(0.001, 0.3), 3)}
        found: dict[str, dict[str, Any]] = {
            "force": {"margin": chance.choice([10.0, 10.0, 2.0, math.inf]), **phrase},
            "ban": banned if chance.random() < 0.3 else {},
            "boost": {"by": [round(chance.uniform(-5, 5), 2) for _ in tokens]},
            "restrict": {"tokens": more},
            "cap": chance.choice([low, rare]),
            "swap": {"tokens": tokens[:2]},
            "set_rank": {"tokens": tokens[:1], "rank": chance.choice([1, 2, 5, 40])},
        }
        return found[verb]

    def condition(self) -> tuple[str, int | None, float]:
        chance = self.chance
        kind = chance.choice(CONDITIONS)
        limits = {
            "entropy": (0.5, 5.5),
            "margin": (0.05, 2.0),
            "rank": (5, 300),
            "prob": (0.0005, 0.02),
        }
        low, high = limits[kind.split("_")[0]]
        limit = round(chance.uniform(low, high), 4)
        token = chance.randrange(3, 320) if kind.startswith(("rank", "prob")) else None
        return kind, token, int(limit) if kind.startswith("rank") else limit


# ---- the two routes


def of_row(program_acts: Sequence[Act], row: int) -> list[Act]:
    """The acts that a row has, with the source that is the row's own."""
    found = []
    for act in program_acts:
        if act.rows is not None and row not in act.rows:
            continue
        if act.values.get("patch"):
            act = dataclasses.replace(act, values={**act.values, "row": row})
        found.append(act)
    return found


def hand_of(model: Any, acts: Sequence[Act], prompts: Sequence[list[int]], row: int) -> Hand:
    return Hand(model, of_row(acts, row), len(prompts[row]), lambda text: [])


def compare(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise where two tensors differ by more than rounding."""
    assert found.shape == wanted.shape, f"{what}: {list(found.shape)}, by hand {list(wanted.shape)}"
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: other values are no numbers"
    found, wanted = (
        found.nan_to_num(0, math.inf, -math.inf),
        wanted.nan_to_num(0, math.inf, -math.inf),
    )
    endless = wanted.isinf()
    assert torch.equal(found.isinf(), endless), f"{what}: other values are without end"
    assert torch.equal(found[endless], wanted[endless]), f"{what}: other values are without end"
    finite = wanted[~endless]
    if not finite.numel():
        return
    size = (
        max(1.0, float(finite[finite.abs() < 1e30].abs().max()))
        if (finite.abs() < 1e30).any()
        else 1.0
    )
    apart = float((found[~endless] - finite).abs().max())
    assert apart <= TOLERANCE * size, f"{what}: apart by {apart:.3g}, the largest is {size:.3g}"


def check(lm: hk.LM, program: Program) -> None:
    """Raise `AssertionError` where hookkit and the second route differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[program.way](lm, program)


def check_captures(source: Any, program: Program, hands: Sequence[Hand]) -> None:
    """The captures of a run or a manager, row by row."""
    for act in program.acts:
        if act.verb != "capture":
            continue
        found = source[act.place, act.name]
        rows = act.rows if act.rows is not None else range(len(program.prompts))
        for number, row in enumerate(rows):
            wanted_places, wanted = hands[row].captured[act.name]
            wanted, count = wanted[0], len(wanted_places)
            mine = found[number]
            if act.site == "pattern":
                mine = mine.transpose(0, 1) if act.head is None else mine
                keys = min(mine.shape[-1], wanted.shape[-1])
                assert (mine[..., keys:] == 0).all() and (wanted[..., keys:] == 0).all(), (
                    "keys that are seen by one"
                )
                mine, wanted = mine[..., :keys], wanted[..., :keys]
            assert len(mine) >= count, f"{act.place}: {len(mine)} positions, by hand {count}"
            compare(mine[:count], wanted, f"capture of {act.place} in row {row}")


def check_forward(lm: hk.LM, program: Program) -> None:
    run = hk.forward(
        lm, program.prompts, *hooks_of(lm, program.acts), logits=program.options["logits"]
    )
    hands = [
        hand_of(lm.model, program.acts, program.prompts, row) for row in range(len(program.prompts))
    ]
    for row, (hand, ids) in enumerate(zip(hands, program.prompts, strict=True)):
        wanted = hand.logits(ids)
        if program.options["logits"] == "all":
            compare(run.logits[row, : len(ids)], wanted, f"logits of row {row}")
        elif program.options["logits"] == "last":
            compare(run.logits[row, -1], wanted[-1], f"last logits of row {row}")
    check_captures(run, program, hands)


def check_attach(lm: hk.LM, program: Program) -> None:
    """A padded call of the user's own. With padding on the left, only where plain transformers itself is right."""
    prompts, model = program.prompts, lm.model
    width = max(map(len, prompts))
    left = program.options["side"] == "left"
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    spans = [slice(width - len(row), width) if left else slice(0, len(row)) for row in prompts]
    for row, (span, prompt) in enumerate(zip(spans, prompts, strict=True)):
        ids[row, span], mask[row, span] = torch.tensor(prompt), 1
    inputs = {"input_ids": ids}
    inputs |= {} if set(map(len, prompts)) == {width} else {"attention_mask": mask}
    if "position_ids" in lm.takes and "attention_mask" in inputs:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(**inputs).logits
        alone = [model(torch.tensor([row])).logits[0] for row in prompts]
    apart = max(float((plain[n, span] - alone[n]).abs().max()) for n, span in enumerate(spans))
    if apart > TOLERANCE * max(1.0, float(plain.abs().max())):
        raise Unstable(f"plain transformers has other logits with this padding, by {apart:.2g}")
    with torch.no_grad(), hk.attach(lm, *hooks_of(lm, program.acts)) as manager:
        logits = model(**inputs).logits
    hands = [hand_of(model, program.acts, prompts, row) for row in range(len(prompts))]
    for row, hand in enumerate(hands):
        compare(logits[row, spans[row]], hand.logits(prompts[row]), f"logits of row {row}")
    check_captures(manager, program, hands)


def forced_last(acts: Sequence[Act]) -> bool:
    return any(act.verb == "force" for act in acts)


def check_generate(lm: hk.LM, program: Program) -> None:
    options, prompts = dict(program.options), program.prompts
    hands = [hand_of(lm.model, program.acts, prompts, row) for row in range(len(prompts))]
    run = hk.generate(lm, prompts, *hooks_of(lm, program.acts), **options)
    if "num_beams" in options:
        check_beams(lm, program, run, hands)
        return
    texts = [list(row) for row in prompts]
    alive = [True] * len(prompts)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(options.get("seed", 0))
    try:
        for step in range(STEPS):
            wanted = torch.stack(
                [hand.logits(text)[-1] for hand, text in zip(hands, texts, strict=True)]
            )
            if options["logits"] == "all":
                for row in (row for row in range(len(prompts)) if alive[row]):
                    compare(run.logits[row, step], wanted[row], f"logits of step {step}, row {row}")
            chosen = next_tokens(wanted, options)
            for row, token in enumerate(chosen.tolist()):
                mine = int(run.tokens[row, len(texts[row])])
                if alive[row] and mine != token:
                    check_near(
                        wanted[row], mine, token, options, f"token of step {step}, row {row}"
                    )
                    alive[row] = False
                texts[row].append(token)
    finally:
        torch.random.set_rng_state(torch_state)
    if all(alive):
        for hand, text in zip(hands, texts, strict=True):
            hand.logits(text[:-1])
        check_captures(run, program, hands)


def next_tokens(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """The tokens that are chosen, as transformers draws them."""
    if not options["do_sample"]:
        return logits.argmax(-1)
    warped = logits.float() / options["temperature"]
    if options["top_k"]:
        warped = warped.masked_fill(
            warped < warped.topk(options["top_k"]).values[:, -1:], -math.inf
        )
    return torch.multinomial(warped.softmax(-1), 1)[:, 0]


def check_near(logits: Tensor, mine: int, token: int, options: dict[str, Any], what: str) -> None:
    """Pass where two tokens stood so close that rounding decides; a draw may fall between any two."""
    size = max(1.0, float(logits[logits.isfinite()].abs().max()))
    near = (
        float(logits[mine]) > -math.inf
        and abs(float(logits[mine] - logits[token])) <= TOLERANCE * size
    )
    assert near, f"{what}: {mine}, by hand {token}{' (drawn)' if options['do_sample'] else ''}"


def check_beams(lm: hk.LM, program: Program, run: hk.types.Run, hands: Sequence[Hand]) -> None:
    options = {
        "max_new_tokens": STEPS,
        "num_beams": program.options["num_beams"],
        "do_sample": False,
    }
    options |= {"eos_token_id": None, "pad_token_id": 0, "use_cache": False}
    for row, (hand, ids) in enumerate(zip(hands, program.prompts, strict=True)):
        with hand.on():
            output = lm.model.generate(
                torch.tensor([ids]),
                **options,
                return_dict_in_generate=True,
                output_scores=True,
                num_return_sequences=2,
            )
        wanted = output.sequences[0, len(ids) :].tolist()
        mine = run.tokens[row, len(ids) : len(ids) + STEPS].tolist()
        scores = output.sequences_scores
        near = float(scores[0] - scores[1]) < 1e-3
        assert mine == wanted or near, f"beams of row {row}: {mine}, by hand {wanted}"
        if mine != wanted:
            return
        hand.logits([*ids, *wanted][:-1])
    check_captures(run, program, hands)


def check_sweep(lm: hk.LM, program: Program) -> None:
    prompts, pos = program.prompts, program.options["pos"]
    first, second = 7, 11
    cells = [hooks_of(lm, cell) for cell in program.cells]
    settings = {"memory": program.options["memory"]} if "memory" in program.options else {}
    table = hk.sweep(
        lm, prompts, {"cell": range(len(cells))}, lambda cell: cells[cell], [hk.metrics.logit(first), hk.metrics.logprob(second)],
        base_hooks=hooks_of(lm, program.acts), pos=pos, progress=False, **settings,
    )  # fmt: skip
    for number, cell in enumerate(program.cells):
        for row, ids in enumerate(prompts):
            logits = (
                hand_of(lm.model, [*program.acts, *cell], prompts, row).logits(ids)[pos].double()
            )
            found = table[(table["cell"] == number) & (table["row"] == row)]
            wanted = torch.stack([logits[first], logits.log_softmax(-1)[second]])
            mine = torch.tensor(
                [float(found["logit"].iloc[0]), float(found["logprob"].iloc[0])]
            ).double()
            compare(mine, wanted, f"cell {number}, row {row}")


CHECKS = {
    "forward": check_forward,
    "attach": check_attach,
    "generate": check_generate,
    "sweep": check_sweep,
}


# ---- differences


def difference(lm: hk.LM, program: Program) -> str:
    """How the two routes differ, in words; empty where they do not."""
    try:
        check(lm, program)
    except Unstable:
        return ""
    except AssertionError as error:
        if unstable(lm, program):
            return ""
        return f"{error}" or traceback.format_exc()[-800:]
    except BadEdit as error:
        refused = any(words in str(error) for words in REFUSED)
        return "" if refused else f"BadEdit: {error}"
    except Exception as error:  # noqa: BLE001  any other error is a difference: the programs are valid
        return f"{type(error).__name__}: {error}"
    return ""


def unstable(lm: hk.LM, program: Program) -> bool:
    """True where the second route itself is another with weights that differ in their last digits: a router, or a
    condition, that hangs on them."""
    wide = copy.deepcopy(lm.model)
    with torch.no_grad():
        for number, weight in enumerate(wide.parameters()):
            weight *= 1 + 3e-7 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(number)
            )
    for acts in (
        [program.acts]
        if program.way != "sweep"
        else [[*program.acts, *cell] for cell in program.cells]
    ):
        for row, ids in enumerate(program.prompts):
            hand = hand_of(lm.model, acts, program.prompts, row)
            other = hand_of(wide, acts, program.prompts, row)
            one, two = hand.logits(ids), other.logits(ids)
            both = one.isfinite() & two.isfinite()
            if not torch.equal(one.isfinite(), two.isfinite()):
                return True
            if float((one[both] - two[both]).abs().max()) > TOLERANCE / 3 * max(
                1.0, float(one[both].abs().max())
            ):
                return True
    return False


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for number in range(len(program.acts)):
        yield dataclasses.replace(
            program, acts=[*program.acts[:number], *program.acts[number + 1 :]]
        )
    for number, cell in enumerate(program.cells):
        if len(program.cells) > 1:
            yield dataclasses.replace(
                program, cells=[*program.cells[:number], *program.cells[number + 1 :]]
            )
        for place in range(len(cell)) if len(cell) > 1 else ():
            cells = list(program.cells)
            cells[number] = [*cell[:place], *cell[place + 1 :]]
            yield dataclasses.replace(program, cells=cells)
    if all(
        act.rows is None and not act.values.get("patch")
        for act in itertools.chain(program.acts, *program.cells)
    ):
        for number in range(len(program.prompts)) if len(program.prompts) > 1 else ():
            yield dataclasses.replace(
                program, prompts=[*program.prompts[:number], *program.prompts[number + 1 :]]
            )


def shrunk(lm: hk.LM, program: Program) -> tuple[Program, str]:
    """The smallest program found that still differs, and how it does."""
    words = difference(lm, program)
    going_on = True
    while going_on:
        going_on = False
        for other in smaller(program):
            if found := difference(lm, other):
                program, words, going_on = other, found, True
                break
    return program, words


def differences(family: str, seeds: Sequence[int], ways: Sequence[str] = WAYS) -> list[str]:
    """Every difference of these programs of a family, with the program."""
    lm = made(family)
    found = []
    for seed in seeds:
        program = Draws(family, lm, seed, ways).program()
        if difference(lm, program):
            program, words = shrunk(lm, program)
            if words:
                found.append(f"{words}\n{program.source()}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", nargs="*", default=NAMES)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started, ran, kinds = time.process_time(), 0, Counter()
    each = -(-asked.count // len(asked.families))
    for family in asked.families:
        seeds = range(asked.seed * 100_000, asked.seed * 100_000 + each)
        found = differences(family, seeds, asked.ways)
        ran += each
        kinds[family] += len(found)
        for text in found:
            print(f"---- {text}\n", flush=True)
        took = time.process_time() - started
        print(
            f"{family}: {each} programs, {len(found)} differ ({took:.0f} s of processor time)",
            flush=True,
        )
    print(f"{ran} programs, {sum(kinds.values())} differ", flush=True)
    return 1 if sum(kinds.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
