"""What `hk.doctor` checks of a model in an engine: that vLLM computes what transformers does."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..models.lm import LM
from ..models.sites import parse_site
from ..runs.engines.vllm_probe import EngineProof, prove_engine

LAWS_BY_COMPARISON = {
    "values": "the engine's values are those of transformers",
    "edit": "reaches",
    "logits": "the engine's logits are those of transformers",
    "token": "reaches",
}


def engine_laws(lm: LM) -> pd.DataFrame:
    """Returns the laws of a model in an engine: one row for each law and name of a site.

    The law "reaches" is an edit: the values after it are those of transformers with the same edit.
    At the logits it is `hk.force`, and tokens that are those of the logits.
    """
    proof = prove_engine(lm)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for comparison in proof.table.to_dict(orient="records"):
        row = _as_law(comparison)
        key = row["law"], row["site"]
        if key not in rows or row["difference"] > rows[key]["difference"]:
            rows[key] = row
    return pd.DataFrame(list(rows.values()))


def _as_law(comparison: Any) -> dict[str, Any]:
    site: Any = parse_site(comparison["site"])
    note = ""
    if not comparison["holds"]:
        note = (
            f"differs at {comparison['site']}, row {comparison['row']}, by "
            f"{comparison['difference']:.2g} of the largest value; {comparison['tolerance']:.0e} "
            "is allowed"
        )
    return {
        "law": LAWS_BY_COMPARISON[comparison["compared"]],
        "site": site.name,
        "difference": comparison["difference"],
        "limit": comparison["tolerance"],
        "holds": comparison["holds"],
        "note": note,
    }


def engine_notes(lm: LM) -> list[str]:
    """Returns what a user should know of the proof of an engine, which `engine_laws` made."""
    assert lm.engine is not None
    proof: EngineProof | None = lm.engine.proof
    if proof is None:
        return []
    notes = [
        f"vLLM was compared with the model in transformers: with its first {proof.blocks} blocks, "
        "which have one block of each kind, and with its head"
    ]
    for window in proof.windows:
        notes.append(
            f"attention in some blocks sees {window} tokens, which no compared prompt was longer "
            "than: vLLM's window was not compared"
        )
    return notes


def engine_facts(lm: LM) -> dict[str, Any]:
    """Returns the facts of the model in its engine, in place of those of this process."""
    engine: Any = lm.engine
    code = "its own" if engine.facts["code"] == "vllm" else "the transformers backend"
    return {
        "class": engine.facts["class"],
        "dtype": engine.facts["dtype"],
        "device": f"{engine.facts['device']}, in process {engine.process_id}",
        "attention": "vLLM's kernel",
        "context": engine.facts["context"],
        "vllm": engine.facts["version"],
        "code of vLLM": code,
    }
