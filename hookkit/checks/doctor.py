"""hk.doctor: a checkup of a model on this machine.

It runs the laws on the model, and reads the facts that decide what works: weights, device and
tokenizer. The `Checkup` says which sites can be captured and edited, what does not work, and why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..arguments import check_arguments, shorten
from ..display import count_of, describe_outcome, first_rows, render_html
from ..errors import HookkitError, Unsupported
from ..models.devices import count_parameters
from ..models.layout import Layout
from ..models.lm import LM
from ..models.sites import AXES, CROSS_SITES
from .engine_checkup import engine_facts, engine_laws, engine_notes
from .laws import UNFINISHED, check_laws

MAX_PROBLEMS = 3  # that the text of a checkup shows
EXCEPTION = "exception: "  # the start of the note of a law from which the family is excepted
SAMPLE = "When Mary and John went to the store, 12 + 34 = 46."


@dataclass(frozen=True, eq=False, repr=False)
class Checkup:
    """The result of `doctor`.

    sites     one row for each site: how many layers have it, whether edits change the output,
              whether every law about it holds, the largest difference, and why it is missing or
              which laws fail; with weights on several devices also its place, as in `LM.describe`
    laws      one row for each law and site, as `check_laws` returns them
    facts     the properties of the model, its weights and its tokenizer, in plain values
    notes     what a user should know
    problems  what does not work, and what to do
    """

    sites: pd.DataFrame
    laws: pd.DataFrame
    facts: dict[str, Any]
    notes: list[str]
    problems: list[str]

    @property
    def healthy(self) -> bool:
        """True if there are no problems."""
        return not self.problems

    def to_json(self) -> str:
        """Returns the whole checkup as JSON."""
        names = ("healthy", "facts", "notes", "problems")
        contents = {name: getattr(self, name) for name in names}
        for name in ("sites", "laws"):
            contents[name] = json.loads(getattr(self, name).to_json(orient="records"))
        return json.dumps(contents, ensure_ascii=False)

    @property
    def _title(self) -> str:
        return "no problem was found" if self.healthy else "something does not work"

    def _repr_html_(self) -> str:
        facts = dict(self.facts)
        for number, problem in enumerate(self.problems, 1):
            facts[f"problem {number}"] = problem
        rows = first_rows(self.sites, "site", "blocks", "editable", "proved")
        return render_html(f"Checkup: {self._title}", facts, rows)

    def __repr__(self) -> str:
        lines = [f"Checkup({shorten(str(self.facts.get('model', '')))}: {self._title})"]
        counts = [count_of(len(self.sites), "site"), count_of(len(self.laws), "law")]
        counts += [count_of(len(self.facts), "fact"), count_of(len(self.notes), "note")]
        lines.append(f"  {', '.join(counts)}")
        for problem in self.problems[:MAX_PROBLEMS]:
            lines.append(f"  problem: {shorten(problem, 200)}")
        if len(self.problems) > MAX_PROBLEMS:
            lines.append(f"  and {len(self.problems) - MAX_PROBLEMS} more problems")
        calls = ("hk.show(checkup.sites)", "checkup.laws", "checkup.facts", "checkup.notes")
        return describe_outcome("\n".join(lines), *calls)


@check_arguments
def doctor(lm: LM, *, layers: list[int] | None = None) -> Checkup:
    """Returns a checkup of a model: the laws, and its dtype, device, attention and tokenizer.

    `layers` are the layers to check; by default the first, middle and last of each kind. It takes
    some seconds on a small model. A site is `editable` if zeroing it changes the output, and
    `proved` if every law about it holds. A model in vLLM is compared with transformers instead:
    values and an edit at each site, and the logits.

    >>> doctor(tiny("gemma2")).healthy
    True
    """
    if lm.engine is not None and layers is not None:
        raise Unsupported(
            f"layers={layers}: a model in vLLM is compared with the first blocks of the same model "
            "in transformers, which have one block of each kind; leave layers out"
        )
    problems, notes = _tokenizer_problems(lm), _notes(lm)
    laws = pd.DataFrame(columns=["law", "site", "difference", "limit", "holds", "note"])
    if not lm.layout.names:
        problems.append(lm.family.why_missing("resid_post"))
    else:
        try:
            laws = check_laws(lm, layers=layers) if lm.engine is None else engine_laws(lm)
        except HookkitError as error:
            problems.append(str(error))
    if lm.engine is not None:
        notes += engine_notes(lm)
    # Another row reports the error of an unfinished law.
    broken: Any = laws[~laws["holds"].astype(bool) & (laws["note"] != UNFINISHED)]
    for row in broken.to_dict(orient="records"):
        messages = notes if row["note"].startswith(EXCEPTION) else problems
        messages.append(_describe_broken_law(row))
    return Checkup(_site_table(lm, laws), laws, facts(lm), notes, problems)


def _describe_broken_law(row: Any) -> str:
    at_site = f" at {row['site']}" if row["site"] else ""
    reason = row["note"] or f"differs by {row['difference']:.2g}; {row['limit']:.2g} is allowed"
    return f"the law {row['law']!r}{at_site}: {reason}"


def _site_table(lm: LM, laws: pd.DataFrame) -> pd.DataFrame:
    names = [name for name in AXES if lm.two_texts or name not in CROSS_SITES]
    rows = [_site_row(lm.layout, "", name, laws) for name in names]
    for stack, layout in lm.layout.stacks.items():
        own_names = [name for name in AXES if name not in CROSS_SITES]
        rows += [_site_row(layout, f"{stack}.", name, laws) for name in own_names]
    table = pd.DataFrame(rows)
    description = lm.describe().set_index("site")
    if "place" in description:
        table.insert(2, "place", description.loc[table["site"], "place"].tolist())
    return table


def _site_row(layout: Layout, prefix: str, name: str, laws: pd.DataFrame) -> dict[str, Any]:
    """Returns the row of one site of a stack from the laws about it."""
    site = prefix + name
    laws = laws.query("site == @site")
    layers = layout.layers(name) if name in layout.names else []
    is_present = layers is None or bool(layers)
    is_exception = laws["note"].str.startswith(EXCEPTION).astype(bool)
    failed = laws["law"][~laws["holds"].astype(bool) & ~is_exception].tolist()
    is_reach = laws["law"] == "reaches"
    reaches = laws["holds"][is_reach]
    differences = laws["difference"][~is_reach & ~is_exception & (laws["note"] != UNFINISHED)]
    return {
        "site": site,
        "blocks": _count_blocks(layout, layers),
        "editable": is_present and len(reaches) > 0 and bool(reaches.all()),
        "proved": is_present and not laws.empty and not failed,
        "difference": differences.max(),
        "why": ", ".join(failed) if is_present else layout.family.why_missing(name),
    }


def _count_blocks(layout: Layout, layers: list[int] | None) -> str:
    if layers is None:
        return "once"
    return f"{len(layers)} of {layout.n_layers}" if layers else ""


def facts(lm: LM) -> dict[str, Any]:
    """Returns the properties of a model on this machine, in plain values."""
    import transformers

    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in lm.root.parameters()})
    buffers = {str(buffer.device) for buffer in lm.root.buffers() if not buffer.is_meta}
    devices = {str(lm.device), *lm.places.values(), *buffers}
    ranks = lm.ranks
    quantisation = getattr(lm.config, "quantization_config", None)
    about_engine = {} if lm.engine is None else engine_facts(lm)
    return {
        "model": lm.name or type(lm.root).__name__,
        "class": type(lm.root).__name__,
        "family": lm.family.name,
        "blocks": lm.n_layers,
        "parameters": count_parameters(lm.root),
        "dtype": ", ".join(dtypes),
        "device": ", ".join(sorted(devices)),
        "processes": f"{ranks.count}, of which this is number {ranks.rank}" if ranks else "1",
        "device map": str(getattr(lm.root, "hf_device_map", None) or "none"),
        "quantisation": "none" if quantisation is None else type(quantisation).__name__,
        "attention": getattr(lm.config, "_attn_implementation", None) or "unknown",
        "context": lm.context,
        **_tokenizer_facts(lm),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **about_engine,
    }


def _tokenizer_facts(lm: LM) -> dict[str, Any]:
    if lm.tokenizer is None:
        return {"tokenizer": "none: prompts are token ids"}
    tokenizer = lm.tokenizer
    ids = tokenizer.encode(SAMPLE)
    starts_with_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    return {
        "tokenizer": type(tokenizer).__name__,
        "pad": _describe_token(lm, tokenizer.pad_token_id),
        "bos": _describe_token(lm, tokenizer.bos_token_id),
        "eos": _describe_token(lm, tokenizer.eos_token_id),
        "adds a bos": starts_with_bos and lm.encode(SAMPLE) != ids,
        "padding side": tokenizer.padding_side,
        "rows without a token": max(0, (lm.sizes["vocab"] or 0) - lm.n_tokens),
    }


def _describe_token(lm: LM, token_id: int | None) -> str:
    if token_id is None:
        return "none"
    return f"{lm.tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"


def _tokenizer_problems(lm: LM) -> list[str]:
    if lm.tokenizer is None:
        return []
    vocab, last = lm.sizes["vocab"], max(lm.tokenizer.get_vocab().values(), default=-1)
    problems = []
    if vocab is not None and last >= vocab:
        problems.append(
            f"the tokenizer has ids up to {last}, and the model's vocabulary ends at {vocab - 1}: "
            "a text with such a token raises BadPrompt. Is it another model's tokenizer? "
            "Load the model's own, or resize its embedding"
        )
    decoded = lm.text(lm.encode(SAMPLE))
    if decoded.strip() != SAMPLE:
        problems.append(
            f"the tokenizer does not give back a text: {SAMPLE!r} becomes {decoded!r}. Its files "
            "are damaged, or it drops what it does not know; positions by text (hk.at) and tokens "
            "by text will be wrong"
        )
    return problems


def _notes(lm: LM) -> list[str]:
    unused = (lm.sizes["vocab"] or 0) - lm.n_tokens
    notes = _masked_notes(lm) if lm.is_masked else _tokenizer_notes(lm.tokenizer)
    if unused > 0:
        notes.append(f"{unused} rows of the vocabulary are no token: they are never ranked")
    return notes + _training_notes(lm) + _missing_site_notes(lm)


def _training_notes(lm: LM) -> list[str]:
    """Returns notes on what is on for training: dropout and gradient checkpointing."""
    notes = []
    modules = list(lm.root.modules())
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    if lm.root.training and has_dropout:
        notes.append(
            "the model is in training mode with dropout: numbers differ from call to call; "
            "call model.eval()"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        notes.append(
            "gradient checkpointing is on: inner hooks have to stand until after the backward pass"
        )
    return notes


def _masked_notes(lm: LM) -> list[str]:
    """Returns notes on a masked language model, in place of those on the padding of generate."""
    mask = getattr(lm.tokenizer, "mask_token", None) or "[MASK]"
    return [
        "it is a masked language model: it reads a whole text at once, in both directions, and "
        "writes none. The laws about writing are not about it. Hooks on logits and tables need "
        f"the position of a mask, such as pos=hk.at({mask!r})"
    ]


def _tokenizer_notes(tokenizer: Any) -> list[str]:
    notes = []
    if tokenizer is not None and tokenizer.pad_token_id is None:
        notes.append(
            "the tokenizer has no pad token: hookkit pads with its end token, which the mask hides"
        )
    if tokenizer is not None and tokenizer.padding_side == "right":
        notes.append("the tokenizer pads on the right: hk.generate pads on the left all the same")
    return notes


def _missing_site_notes(lm: LM) -> list[str]:
    notes = []
    for name in lm.layout.names:
        layers = lm.layout.layers(name)
        if layers is not None and len(layers) < lm.n_layers:
            missing = sorted(set(range(lm.n_layers)) - set(layers))
            numbers, reason = _list_layers(missing), lm.family.why_missing(name)
            notes.append(f"{name} is not in {len(missing)} blocks ({numbers}): {reason}")
    return notes


def _list_layers(layers: list[int]) -> str:
    if len(layers) < 6:
        return ", ".join(map(str, layers))
    return f"{', '.join(map(str, layers[:3]))}, …, {layers[-1]}"
