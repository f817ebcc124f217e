"""The second route of the random programs: hooks written by hand on plain transformers, on whole forwards without a
cache, each prompt alone. No hookkit here.

A program is a list of `Act`s in plain words. `Hand` puts them on the modules of a model, at the boundaries that
`by_hand_families` knows, and `boundary` names for editing.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import by_hand_families
import torch
from by_hand_families import Block, multiplier, names_of, split_rows
from torch import Tensor, nn

HEADED = ("q", "k", "v", "z", "q_rot", "k_rot", "pattern")
INSIDE = (
    "q_rot",
    "k_rot",
    "pattern",
)  # reached through the function that the modelling file calls for attention


@dataclass
class Act:
    """One hook in words: what is done (`verb` and its `values`), where, at which positions of which rows.

    pos   None, a number, a list, a slice, "PROMPT", "GENERATED", or ("at", text)
    step  None, a number, a list or a slice: positions counted from the prompt's last, at the logits only
    """

    verb: str
    site: str
    layer: int | None = None
    head: int | None = None
    pos: Any = None
    rows: list[int] | None = None
    step: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def place(self) -> str:
        return ".".join(
            str(part) for part in (self.site, self.layer, self.head) if part is not None
        )


@dataclass
class Boundary:
    """A module and its side, and the part of the tensor there that is meant: `index` [head, d_head] or [d] picks numbers
    of the last axis, `factor` multiplies them; `heads` cuts all of it into so many."""

    module: nn.Module
    side: str
    index: Tensor | None = None
    heads: int = 0
    factor: float = 1.0

    def read(self, found: Tensor) -> Tensor:
        if self.index is not None:
            found = found[..., self.index]
        elif self.heads:
            found = found.unflatten(-1, (self.heads, -1))
        return found * self.factor

    def write(self, found: Tensor, new: Tensor) -> Tensor:
        new = new / self.factor
        if self.index is None:
            return new.reshape(found.shape)
        changed = found.clone()
        changed[..., self.index.flatten()] = new.reshape(*found.shape[:-1], -1)
        return changed


def mixer(block: Block) -> nn.Module | None:
    """What stands in the place of attention in some blocks."""
    return next(
        (
            getattr(block.whole, name)
            for name in ("linear_attn", "conv", "mamba", "self_attn")
            if hasattr(block.whole, name)
        ),
        None,
    )


def boundary(model: nn.Module, site: str, layer: int | None) -> Boundary | None:
    """Where a site can be changed by hand; None where it is not there, or no boundary of modules."""
    config, names = model.config, names_of(model.config)
    if layer is None:
        return _of_the_whole(model, site)
    block = Block(model, layer)
    if site in ("resid_pre", "resid_post"):
        return Boundary(block.whole, "in" if site == "resid_pre" else "out")
    if names is by_hand_families.MAMBA:
        return None
    if site in ("q", "k", "v", "z"):
        return None if block.attn is None else _inside_attention(block, config, site)
    if site in ("attn_in", "attn_out"):
        attention = block.attn if block.attn is not None else mixer(block)
        if site == "attn_in":
            return Boundary(attention, "in")
        ends = (block.after_attn, block.out, attention)
        return Boundary(
            next(end for end in ends if end is not None), "out", factor=multiplier(config, "attn")
        )
    return None if block.mlp is None else _inside_mlp(block, config, site)


def _of_the_whole(model: nn.Module, site: str) -> Boundary | None:
    names = names_of(model.config)
    body = model.get_submodule(names.body)
    whole = {
        "embed": (body.get_submodule(names.embed), "out"),
        "pos_embed": (
            None if names.positions is None else body.get_submodule(names.positions),
            "out",
        ),
        "final_norm": (model.lm_head, "in"),
        "lm_head": (model.lm_head, "out"),
        "logits": (model, "out"),
    }
    module, side = whole[site]
    return None if module is None else Boundary(module, side)


def _inside_mlp(block: Block, config: Any, site: str) -> Boundary | None:
    names = block.names
    gate = block.mlp.get_submodule(names.gate) if block.dense else None
    if site == "mlp_in":
        return Boundary(gate if names.mlp == "" else block.mlp, "in")
    if site == "mlp_out":
        ends = (block.after_mlp, block.down, block.mlp)
        return Boundary(
            next(end for end in ends if end is not None), "out", factor=multiplier(config, "attn")
        )
    if gate is None:
        return None
    if site == "mlp_post":
        return Boundary(block.down, "in")
    half = by_hand_families.weight(gate)[0].shape[0] // 2
    return Boundary(gate, "out", torch.arange(half) if names.up == names.gate else None)


def _inside_attention(block: Block, config: Any, site: str) -> Boundary | None:
    heads, attn, layout = config.num_attention_heads, block.attn, block.names.layout
    if site == "z":
        return Boundary(block.out, "in", heads=heads)
    if layout == "latent":
        if site in ("k", "v"):
            return None
        last = attn.q_b_proj if getattr(attn, "q_proj", None) is None else attn.q_proj
        return Boundary(last, "out", heads=heads)
    if layout == "separate":
        projection = getattr(attn, f"{site}_proj", None)
        if projection is None:
            return None
        count = by_hand_families.weight(projection)[0].shape[0]
        rows = torch.arange(count).unflatten(
            0, (-1, by_hand_families.weight(block.out)[0].shape[1] // heads)
        )
        if site == "q" and config.model_type == "qwen3_next":
            rows = rows[::2]
        return Boundary(projection, "out", rows)
    rows = torch.arange(by_hand_families.weight(block.qkv)[0].shape[0])
    return Boundary(block.qkv, "out", split_rows(block, config, rows)["qkv".index(site)])


def places(where: Any, length: int, count: int) -> list[int]:
    """The positions that are meant in a row whose prompt has `length` tokens, of the `count` that it has by now."""
    if where is None:
        return list(range(count))
    if where == "PROMPT":
        return list(range(min(length, count)))
    if where == "GENERATED":
        return list(range(length, count))
    if isinstance(where, slice):
        start, stop = where.start or 0, count if where.stop is None else where.stop
        start = max(0, start + length) if start < 0 else start
        stop = max(0, stop + length) if where.stop is not None and where.stop < 0 else stop
        return list(range(start, min(stop, count), where.step or 1))
    numbers = [where] if isinstance(where, int) else where
    return sorted(
        place for number in numbers if (place := number + length if number < 0 else number) < count
    )


def steps(where: Any, length: int, count: int) -> list[int]:
    """The same for steps: step 0 is at the prompt's last token."""
    wanted = places(slice(0, None) if where is None else where, 0, count - length + 1)
    return [step + length - 1 for step in wanted]


class Hand:
    """The acts of one row on a model, as hooks that are given whole texts [n, T], all with one prompt."""

    def __init__(
        self, model: nn.Module, acts: Sequence[Act], length: int, find: Callable[[str], list[int]]
    ) -> None:
        self.model, self.length, self.find = model, length, find
        self.acts = list(acts)
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.captured: dict[str, tuple[list[int], Tensor]] = {}
        self.streams: dict[int, Tensor] = {}  # what each block was given, for resid_mid

    def wanted(self, act: Act) -> list[int]:
        """The positions of an act in the texts that run."""
        count = self.ids.shape[1]
        if act.step is not None or (act.values.get("at_steps") and act.pos is None):
            return steps(act.step, self.length, count)
        if isinstance(act.pos, tuple):
            return self.find(act.pos[1])
        return places(act.pos, self.length, count)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The block in which the hooks are there."""
        groups: dict[tuple[nn.Module, str], list[tuple[Act, Boundary]]] = {}
        inside: dict[nn.Module, list[Act]] = {}
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for act in sorted(self.acts, key=lambda act: act.site == "resid_mid"):
            if act.site in INSIDE or act.verb == "knockout":
                inside.setdefault(Block(self.model, act.layer).attn, []).append(act)
                continue
            place = boundary(
                self.model, "attn_out" if act.site == "resid_mid" else act.site, act.layer
            )
            groups.setdefault((place.module, place.side), []).append((act, place))
        for (module, side), work in groups.items():
            if side == "in":
                handles.append(
                    module.register_forward_pre_hook(self._before(work), with_kwargs=True)
                )
            else:
                handles.append(module.register_forward_hook(self._after(work), with_kwargs=True))
        handles += [self._keep_stream(act.layer) for act in self.acts if act.site == "resid_mid"]
        try:
            if inside:
                with self._attention(inside):
                    yield
            else:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, ids: list[int]) -> Tensor:
        """What plain transformers says with these hooks, [pos, vocab]."""
        with torch.no_grad(), self.on():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ids = args[0] if args else kwargs["input_ids"]

    def _keep_stream(self, layer: int) -> Any:
        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.streams[layer] = args[0] if args else kwargs["hidden_states"]

        block = Block(self.model, layer).whole
        first = Block(self.model, layer).before_attn
        if first is None:
            return block.register_forward_pre_hook(keep, with_kwargs=True)
        return first.register_forward_pre_hook(keep, with_kwargs=True)

    def _before(self, work: list[tuple[Act, Boundary]]) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                return (self._done(args[0], work, None), *args[1:]), kwargs
            name = next(name for name in ("hidden_states", "input", "x") if name in kwargs)
            return args, {**kwargs, name: self._done(kwargs[name], work, None)}

        return hook

    def _after(self, work: list[tuple[Act, Boundary]]) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if work[0][0].site == "logits":
                output.logits = self._done(output.logits, work, None)
                return output
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(output, tuple):
                return (self._done(output[0], work, given), *output[1:])
            return self._done(output, work, given)

        return hook

    def _done(
        self, found: Tensor, work: list[tuple[Act, Boundary]], given: Tensor | None
    ) -> Tensor:
        """The tensor at a boundary after the acts there."""
        shape, rows = found.shape, len(self.ids)
        if found.ndim == 2 and len(found) == rows * self.ids.shape[1]:
            found = found.unflatten(0, (rows, -1))
        if found.shape[0] != rows:
            found = found.expand(rows, *found.shape[1:])
            shape = found.shape
        for act, place in work:
            value = place.read(found)
            middle = 0.0
            if act.site == "resid_mid":
                middle = self.streams[act.layer].reshape(value.shape)
                value = value + middle
            new = self.change(act, value, given)
            if new is not value:
                found = place.write(found, new - middle)
        return found.reshape(shape)

    def change(self, act: Act, value: Tensor, given: Tensor | None = None) -> Tensor:
        """`value` [n, T, ...] with the act done at its positions. T may be the last positions only, at the logits."""
        behind = self.ids.shape[1] - value.shape[1]
        wanted = [place - behind for place in self.wanted(act) if place >= behind]
        if not wanted:
            return value
        heads = slice(None) if act.head is None else act.head
        cells = (slice(None), wanted) if act.site not in HEADED else (slice(None), wanted, heads)
        part = value[cells]
        if act.verb == "capture":
            self.captured[act.name] = [place + behind for place in wanted], part.clone()
            return value
        if act.verb == "skip_block":
            new = given[:, wanted]
        else:
            new = VERBS[act.verb](
                part, act.values, Spot(self, [place + behind for place in wanted])
            )
        changed = value.clone()
        changed[cells] = new
        return changed

    @contextmanager
    def _attention(self, inside: dict[nn.Module, list[Act]]) -> Iterator[None]:
        """A block in which the modelling file's own eager attention is changed in some modules."""
        file = sys.modules[type(self.model).__module__]
        eager, implementation = file.eager_attention_forward, self.model.config._attn_implementation

        def changed(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            **how: Any,
        ):
            acts = inside.get(module, [])
            query = self._turned(query, [act for act in acts if act.site == "q_rot"])
            key = self._turned(key, [act for act in acts if act.site == "k_rot"])
            for act in (act for act in acts if act.verb == "knockout"):
                mask = self._cut(act, query, mask)
            output, pattern = eager(module, query, key, value, mask, **how)
            patterns = [act for act in acts if act.site == "pattern"]
            for act in patterns:
                new = self.change(act, pattern.transpose(1, 2)).transpose(1, 2)
                if act.verb != "capture":
                    pattern = new
            if any(act.verb != "capture" for act in patterns):
                values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
                output = (pattern @ values).transpose(1, 2)
            return output, pattern

        try:
            file.eager_attention_forward = changed
            self.model.set_attn_implementation("eager")
            yield
        finally:
            file.eager_attention_forward = eager
            self.model.set_attn_implementation(implementation)

    def _turned(self, value: Tensor, acts: Sequence[Act]) -> Tensor:
        for act in acts:
            value = self.change(act, value.transpose(1, 2)).transpose(1, 2)
        return value

    def _cut(self, act: Act, query: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, count = query.shape[:3]
        mask = torch.zeros(rows, 1, count, count) if mask is None else mask
        mask = mask.expand(rows, heads, count, count).clone()
        keys = places(act.values["key"], self.length, count)
        for place in self.wanted(act):
            chosen = slice(None) if act.head is None else act.head
            mask[:, chosen, place, keys] = torch.finfo(mask.dtype).min
        return mask


@dataclass
class Spot:
    """Where an act stands: the texts that are read, and the positions."""

    hand: Hand
    wanted: list[int]

    def step(self, column: int) -> int:
        return self.wanted[column] - self.hand.length + 1


Verb = Callable[[Tensor, dict[str, Any], Spot], Tensor]


def _fitted(tensor: Tensor, part: Tensor) -> Tensor:
    return tensor.expand(part.shape).clone()


def _reference(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    """What other prompts have: `values["runs"]`, each [pos, ...]; their mean at each position, or over all of them."""
    runs = values["runs"]
    if values.get("row") is not None:
        runs = [runs[values["row"] if len(runs) > 1 else 0]]
    if values.get("per") == "all":
        new = _fitted(torch.cat(runs).mean(0), part)
    else:
        new = _fitted(torch.stack([_mean_at(runs, place) for place in spot.wanted]), part)
    return _units(part, new, values)


def _mean_at(runs: Sequence[Tensor], place: int) -> Tensor:
    """The mean of what is at a position, of the prompts that are that long."""
    return torch.stack([run[place] for run in runs if len(run) > place]).mean(0)


def _units(part: Tensor, new: Tensor, values: dict[str, Any]) -> Tensor:
    """Only some numbers of the last axis replaced."""
    if values.get("units") is None:
        return new
    kept = part.clone()
    kept[..., values["units"]] = new[..., values["units"]]
    return kept


def _project_out(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    directions = torch.atleast_2d(values["vector"]).double()
    return (part.double() - part.double() @ torch.linalg.pinv(directions) @ directions).to(
        part.dtype
    )


def holds(when: tuple | None, logits: Tensor) -> Tensor:
    """Where a condition holds, [n, pos]."""
    if when is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool)
    kind, token, limit = when
    chances = logits.softmax(-1)
    ordered = logits.sort(-1, descending=True).values
    found = {
        "entropy_above": lambda: -(chances * chances.clamp(min=1e-30).log()).sum(-1) > limit,
        "entropy_below": lambda: -(chances * chances.clamp(min=1e-30).log()).sum(-1) < limit,
        "margin_above": lambda: ordered[..., 0] - ordered[..., 1] > limit,
        "margin_below": lambda: ordered[..., 0] - ordered[..., 1] < limit,
        "rank_at_most": lambda: 1 + (logits > logits[..., token, None]).sum(-1) <= limit,
        "rank_at_least": lambda: 1 + (logits > logits[..., token, None]).sum(-1) >= limit,
        "prob_at_most": lambda: chances[..., token] <= limit,
        "prob_at_least": lambda: chances[..., token] >= limit,
    }
    return found[kind]()


def at_logits(change: Verb) -> Verb:
    """A verb that acts where its condition holds."""

    def changed(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
        return torch.where(
            holds(values.get("when"), part)[..., None], change(part, values, spot), part
        )

    return changed


def _force(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new = part.clone()
    tokens, margin = values["tokens"], values["margin"]
    for column in range(part.shape[1]):
        token = tokens[0]
        if len(tokens) > 1:
            since = spot.step(column) - values["start"]
            if not 0 <= since < len(tokens):
                continue
            token = tokens[since]
        if margin == math.inf:
            kept = part[:, column, token].clone()
            new[:, column] = -math.inf
            new[:, column, token] = kept.clamp(min=torch.finfo(part.dtype).min)
        else:
            new[:, column, token] = part[:, column].amax(-1) + margin
    return new


def _ban(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new, tokens = part.clone(), values["tokens"]
    if not values.get("phrase"):
        new[..., tokens] = -math.inf
        return new
    for column, place in enumerate(spot.wanted):
        for row, ids in enumerate(spot.hand.ids.tolist()):
            before = ids[max(0, place + 1 - len(tokens) + 1) : place + 1]
            if before == tokens[:-1]:
                new[row, column, tokens[-1]] = -math.inf
    return new


def _boost(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new = part.clone()
    for token, by in zip(values["tokens"], values["by"], strict=True):
        new[..., token] += by
    return new


def _restrict(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new = torch.full_like(part, -math.inf)
    new[..., values["tokens"]] = part[..., values["tokens"]]
    return new


def _cap(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new, tokens = part.clone(), values["tokens"]
    if values.get("logit") is not None:
        new[..., tokens] = part[..., tokens].clamp(max=values["logit"])
        return new
    limit = values["prob"]
    held = part.softmax(-1)[..., tokens].sum(-1, keepdim=True)
    down = (math.log(limit / (1 - limit)) - (held / (1 - held)).log()).clamp(max=0)
    new[..., tokens] = part[..., tokens] + down
    return new


def _swap(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    new, (first, second) = part.clone(), values["tokens"]
    new[..., first], new[..., second] = part[..., second], part[..., first]
    return new


def _set_rank(part: Tensor, values: dict[str, Any], spot: Spot) -> Tensor:
    (token,), rank = values["tokens"], values["rank"]
    others = part.clone()
    others[..., token] = -math.inf
    ordered = others.sort(-1, descending=True).values
    new = part.clone()
    new[..., token] = (
        ordered[..., 0] + 1 if rank == 1 else (ordered[..., rank - 2] + ordered[..., rank - 1]) / 2
    )
    return new


VERBS: dict[str, Verb] = {
    "edit": lambda part, values, spot: values["function"](part),
    "zero": lambda part, values, spot: _units(part, torch.zeros_like(part), values),
    "tensor": lambda part, values, spot: _units(part, _fitted(values["vector"], part), values),
    "reference": _reference,
    "steer": lambda part, values, spot: part + values["scale"] * values["vector"],
    "scale": lambda part, values, spot: part * values["factor"],
    "project_out": _project_out,
    "force": at_logits(_force),
    "ban": at_logits(_ban),
    "boost": at_logits(_boost),
    "restrict": at_logits(_restrict),
    "cap": at_logits(_cap),
    "swap": at_logits(_swap),
    "set_rank": at_logits(_set_rank),
}


def site_values(
    model: nn.Module, ids: list[int], site: str, layer: int | None, head: int | None
) -> Tensor:
    """What is at a site of a prompt without any edit, [pos, ...]."""
    look = Act("capture", site, layer, head, name="look")
    hand = Hand(model, [look], len(ids), lambda text: [])
    hand.logits(ids)
    return hand.captured["look"][1][0]
