"""Laws of a model that is only looked at."""

from collections.abc import Iterator

import torch

from ..prompts import as_batch
from ..sites import Site
from .law import Finding, law
from .study import Study, apart


@law("nothing", "logits")
def _nothing(study: Study) -> Iterator[Finding]:
    """Without hooks, logits are those of plain transformers, to the bit."""
    batch = as_batch(study.lm, study.prompts)
    with torch.no_grad():
        expected = study.lm.model(**batch.inputs(study.lm), use_cache=False).logits
    found = study.plain.logits
    same = [torch.equal(found[row, :length], expected[row, :length]) for row, length in enumerate(batch.lengths)]
    worst = max(apart(found[row, :length], expected[row, :length]) for row, length in enumerate(batch.lengths))
    yield Finding("logits", worst if not all(same) else 0.0, 0.0)


@law("looking", "logits")
def _looking(study: Study) -> Iterator[Finding]:
    """Capturing every site changes nothing, to the bit."""
    same = torch.equal(study.run.logits, study.plain.logits)
    yield Finding("logits", 0.0 if same else apart(study.run.logits, study.plain.logits), 0.0)


@law("sum", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
def _sum(study: Study) -> Iterator[Finding]:
    """What attention and the MLP add to the stream that enters a block is the stream that leaves it."""
    run = study.run
    for layer in study.having("attn_out", "mlp_out"):
        total = run[f"resid_pre.{layer}"] + run[f"attn_out.{layer}"] + run[f"mlp_out.{layer}"]
        difference = apart(total, run[f"resid_post.{layer}"])
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
            yield Finding(name, difference, study.limit)
    for layer in study.having("attn_out", "resid_mid"):
        middle = run[f"resid_pre.{layer}"] + run[f"attn_out.{layer}"]
        yield Finding("resid_mid", apart(middle, run[f"resid_mid.{layer}"]), study.limit)


@law("projection", "z", "mlp_post")
def _projection(study: Study) -> Iterator[Finding]:
    """z and the MLP's neurons, through the projection behind them, give what is added to the stream."""
    for name, added in (("z", "attn_out"), ("mlp_post", "mlp_out")):
        for layer in study.having(name, added):
            source, target = Site(name, layer), Site(added, layer)
            values = study.run[source]
            values = values.flatten(2) if name == "z" else values
            for row, length in enumerate(study.run.lengths):  # a row is padded with zeros, which a bias moves
                written = study.written(values[row : row + 1, :length], source, target)
                yield Finding(name, apart(written, study.run[target][row : row + 1, :length]), study.limit)


@law("unembedding", "final_norm")
def _unembedding(study: Study) -> Iterator[Finding]:
    """The head, given what final_norm has, gives what lm_head has."""
    if {"final_norm", "lm_head"} <= set(study.lm.layout.names):
        head = study.lm.submodule(study.lm.place(Site("lm_head")).path)
        for row, length in enumerate(study.run.lengths):
            with torch.no_grad():
                found = head(study.run["final_norm"][row : row + 1, :length])
            expected = study.run["lm_head"][row : row + 1, :length]
            yield Finding("final_norm", apart(found.float(), expected.float()), study.limit)


@law("pattern", "pattern")
def _pattern(study: Study) -> Iterator[Finding]:
    """A query's pattern sums to 1, or to less where a sink takes a part, and no query sees a later key."""
    for layer in study.having("pattern"):
        pattern = study.run[f"pattern.{layer}"].float()
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool).triu(1)[: pattern.shape[-2], : pattern.shape[-1]]
        yield Finding("pattern", float(pattern.masked_select(later.to(pattern.device)).abs().sum()), 0.0)
        sums = pattern.sum(-1).cpu()[study.run.mask.cpu()[:, None].expand(-1, pattern.shape[1], -1)]
        yield Finding("pattern", max(0.0, float(sums.max()) - 1), study.limit)
        yield Finding("pattern", float(sums.min()), 0.0, at_least=True)
