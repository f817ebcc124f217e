"""hk.doctor: what hookkit can do with a model on this machine, proved, and what will not work and why."""

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..arguments import checks_arguments
from ..display import records, shown
from ..errors import HookkitError
from ..models.devices import count
from ..models.lm import LM
from ..models.sites import AXES
from .laws import UNTRIED, prove

SAMPLE = "When Mary and John went to the store, 12 + 34 = 46."


@dataclass(frozen=True, eq=False, repr=False)
class Checkup:
    """What `doctor` found.

    sites     one row for each site: how many blocks have it, whether edits reach the output, whether every law that
              names it holds, the largest difference seen, and why it is missing or which laws fail; where the weights
              are in more than one place, also place: where the site's are, as `LM.describe` says it
    laws      one row for each law and site, as `prove` gives them
    facts     what the model, its weights and its tokenizer are, in plain values
    notes     what a user should know
    problems  what will not work, and what to do
    """

    sites: pd.DataFrame
    laws: pd.DataFrame
    facts: dict[str, Any]
    notes: list[str]
    problems: list[str]

    @property
    def healthy(self) -> bool:
        """True where nothing was found that does not work."""
        return not self.problems

    def to_json(self) -> str:
        """All of it as JSON."""
        tables = {
            name: json.loads(getattr(self, name).to_json(orient="records"))
            for name in ("sites", "laws")
        }
        said = {
            "healthy": self.healthy,
            "facts": self.facts,
            "notes": self.notes,
            "problems": self.problems,
        }
        return json.dumps({**said, **tables}, ensure_ascii=False)

    def _repr_html_(self) -> str:
        said = {f"problem {number}": words for number, words in enumerate(self.problems, 1)}
        title = (
            "Checkup: nothing was found that does not work"
            if self.healthy
            else "Checkup: something does not work"
        )
        return shown(
            title,
            {**self.facts, **said},
            records(self.sites, "site", "blocks", "editable", "proved"),
        )

    def __repr__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        lines += [
            "",
            self.sites.to_string(index=False, float_format=lambda number: f"{number:.1e}"),
        ]
        for title, said in (("Notes", self.notes), ("Problems", self.problems)):
            lines += ["", *(f"{title}: {each}" for each in said)] if said else []
        return "\n".join(lines)


@checks_arguments
def doctor(lm: LM, *, layers: list[int] | None = None) -> Checkup:
    """The laws on this very model, and the facts that decide what works: dtype, device, attention, tokenizer.

    `layers` are the blocks to try; the first, middle and last of each kind if left out. Takes some seconds on a small
    model. A site is `editable` where zeroing it changes the output, and `proved` where every law that names it holds.

    >>> doctor(tiny("gemma2")).healthy
    True
    """
    problems = [*_tokenizer_problems(lm)]
    notes = [*_notes(lm)]
    laws = pd.DataFrame(columns=["law", "site", "difference", "limit", "holds", "note"])
    if not lm.layout.names:
        problems.append(f"{lm.family.why_missing('resid_post')}")
    else:
        try:
            laws = prove(lm, layers=layers)
        except HookkitError as error:
            problems.append(str(error))
    for law in _records(laws):
        if not law["holds"] and law["note"] != UNTRIED:  # the error itself is said once
            at = f" at {law['site']}" if law["site"] else ""
            words = (
                law["note"] or f"differs by {law['difference']:.2g}, and may by {law['limit']:.2g}"
            )
            (notes if _excused(law) else problems).append(f"the law {law['law']!r}{at}: {words}")
    return Checkup(_sites(lm, _records(laws)), laws, facts(lm), notes, problems)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): value for name, value in row.items()} for row in table.to_dict(orient="records")
    ]


def _excused(law: dict[str, Any]) -> bool:
    return law["note"].startswith("exception: ")


def _sites(lm: LM, laws: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for name in AXES:
        layers = lm.layout.layers(name) if name in lm.layout.names else []
        there = layers != []
        mine = [law for law in laws if law["site"] == name]
        failed = [law["law"] for law in mine if not law["holds"] and not _excused(law)]
        reaches = [law["holds"] for law in mine if law["law"] == "reaches"]
        compared = [
            law
            for law in mine
            if law["law"] != "reaches" and law["note"] != UNTRIED and not _excused(law)
        ]
        rows.append(
            {
                "site": name,
                "blocks": ("once" if layers is None else f"{len(layers)} of {lm.n_layers}")
                if there
                else "",
                "editable": bool(there and reaches and all(reaches)),
                "proved": bool(there and mine and not failed),
                "difference": max((law["difference"] for law in compared), default=float("nan")),
                "why": ", ".join(failed) if there else lm.family.why_missing(name),
            }
        )
    table = pd.DataFrame(rows)
    if "place" in (known := lm.describe().set_index("site")):
        table.insert(2, "place", known.loc[table["site"], "place"].tolist())
    return table


def facts(lm: LM) -> dict[str, Any]:
    """What a model is and how it stands on this machine, in plain values."""
    import transformers

    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in lm.root.parameters()})
    quantised = getattr(lm.config, "quantization_config", None)
    said: dict[str, Any] = {
        "model": lm.name or type(lm.root).__name__,
        "class": type(lm.root).__name__,
        "family": lm.family.name,
        "blocks": lm.n_layers,
        "parameters": count(lm.root),
        "dtype": ", ".join(kinds),
        "device": ", ".join(sorted({str(lm.device), *_places(lm)})),
        "processes": "1"
        if lm.ranks is None
        else f"{lm.ranks.count}, of which this is number {lm.ranks.rank}",
        "device map": str(getattr(lm.root, "hf_device_map", None) or "none"),
        "quantisation": type(quantised).__name__ if quantised is not None else "none",
        "attention": getattr(lm.config, "_attn_implementation", None) or "unknown",
        "context": lm.context,
    }
    return (
        said
        | _tokenizer_facts(lm)
        | {"torch": torch.__version__, "transformers": transformers.__version__}
    )


def _places(lm: LM) -> set[str]:
    """Where weights and buffers are; of those that accelerate keeps elsewhere, where that is."""
    buffers = {str(buffer.device) for buffer in lm.root.buffers() if not buffer.is_meta}
    return {*lm.places.values(), *buffers}


def _tokenizer_facts(lm: LM) -> dict[str, Any]:
    if lm.tokenizer is None:
        return {"tokenizer": "none: prompts are token ids"}
    tokenizer = lm.tokenizer
    return {
        "tokenizer": type(tokenizer).__name__,
        "pad": _token(lm, tokenizer.pad_token_id),
        "bos": _token(lm, tokenizer.bos_token_id),
        "eos": _token(lm, tokenizer.eos_token_id),
        "adds a bos": _adds_bos(lm),
        "padding side": tokenizer.padding_side,
        "rows without a token": max(0, (lm.sizes["vocab"] or 0) - lm.n_tokens),
    }


def _token(lm: LM, token_id: int | None) -> str:
    return (
        "none"
        if token_id is None
        else f"{lm.tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"
    )


def _adds_bos(lm: LM) -> bool:
    ids = lm.tokenizer.encode(SAMPLE)
    return bool(ids) and ids[0] == lm.tokenizer.bos_token_id and lm.encode(SAMPLE) != ids


def _tokenizer_problems(lm: LM) -> list[str]:
    if lm.tokenizer is None:
        return []
    vocab, last = lm.sizes["vocab"], max(lm.tokenizer.get_vocab().values(), default=-1)
    found = []
    if vocab is not None and last >= vocab:
        found.append(
            f"the tokenizer has ids up to {last}, and the model's vocabulary ends at {vocab - 1}: a text with such a "
            "token raises BadPrompt. Is it another model's tokenizer? Load the model's own, or resize its embedding"
        )
    ids = lm.encode(SAMPLE)
    again = lm.text(ids)
    if again.strip() != SAMPLE:
        found.append(
            f"the tokenizer does not give back a text: {SAMPLE!r} becomes {again!r}. Its files are damaged, or it "
            "drops what it does not know; positions by text (hk.at) and tokens by text will be wrong"
        )
    return found


def _notes(lm: LM) -> list[str]:
    found = []
    tokenizer = lm.tokenizer
    if tokenizer is not None and tokenizer.pad_token_id is None:
        found.append(
            "the tokenizer has no pad token: hookkit pads with its end token, which the mask hides"
        )
    if tokenizer is not None and tokenizer.padding_side == "right":
        found.append("the tokenizer pads on the right: hk.generate pads on the left all the same")
    unused = (lm.sizes["vocab"] or 0) - lm.n_tokens
    if unused > 0:
        found.append(f"{unused} rows of the vocabulary are no token: they are never ranked")
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in lm.root.modules())
    if lm.root.training and drops:
        found.append(
            "the model is in training mode with dropout: numbers differ from call to call; call model.eval()"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in lm.root.modules()):
        found.append(
            "gradient checkpointing is on: inner hooks have to stand until after the backward pass"
        )
    for name in lm.layout.names:
        layers = lm.layout.layers(name)
        if layers is not None and len(layers) < lm.n_layers:
            missing = [layer for layer in range(lm.n_layers) if layer not in layers]
            found.append(
                f"{name} is not in {len(missing)} blocks ({_short(missing)}): {lm.family.why_missing(name)}"
            )
    return found


def _short(layers: list[int]) -> str:
    shown = [str(layer) for layer in layers]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "…", shown[-1]])
