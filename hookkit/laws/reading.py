"""Laws of a model that reads batches and writes."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from .. import hooks as hk
from ..manager import attach
from ..model import LM
from ..prompts import as_batch
from ..runs import forward, generate
from ..sites import AXES, LOGITS, SQUARE, Site
from .law import Finding, law
from .study import Study, apart, compared

NEW = 3  # tokens that are generated
READ = 10  # times the limit: what reading in another shape may cost, since a pattern makes much of little
BY_ROW = tuple(name for name in AXES if name != "experts")  # a tie may fall either way; their weights are compared
WRITTEN = tuple(name for name in BY_ROW if name not in LOGITS)  # generate asks these for a prompt's last position only
EDITED_WRITING = ("resid_post", "k", "v", "k_rot", "q_rot", "z")


@law("batch", *BY_ROW)
def _batch(study: Study) -> Iterator[Finding]:
    """A row alone is the row in a batch, padded on the right or on the left, at every site."""
    sites = study.sites
    left = {"input_ids": [], "attention_mask": []}
    rows = as_batch(study.lm, study.prompts).rows
    width = max(map(len, rows))
    for row in rows:
        left["input_ids"].append([0] * (width - len(row)) + list(row))
        left["attention_mask"].append([0] * (width - len(row)) + [1] * len(row))
    padded_left = _left(study, left, sites)
    for number, row in enumerate(rows):
        alone = forward(study.lm, [list(row)], hk.capture(sites))
        for site in sites:
            if site.name not in BY_ROW:
                continue
            expected = alone.captured(site).by_place[0]
            for together in (study.run[site], padded_left[site]):
                whole_square = site.name in SQUARE
                found = (together.transpose(1, 2) if whole_square else together)[number, : expected.shape[0]]
                yield Finding(site.name, compared(site, found, expected), READ * study.limit)


def _left(study: Study, batch: dict[str, list[list[int]]], sites: list[Site]) -> dict[Site, Tensor]:
    """What a forward by plain transformers of a batch padded on the left has at every site."""
    ids, mask = (torch.tensor(batch[name], device=study.lm.device) for name in ("input_ids", "attention_mask"))
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in study.lm.takes:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(study.lm, hk.capture(sites)) as manager, torch.no_grad():
        study.lm.model(**given, use_cache=False)
    return {site: manager[site] for site in sites}


@law("writing", *WRITTEN, "logits")
def _writing(study: Study) -> Iterator[Finding]:
    """While generating, with the cache, every site has what a forward over the whole text has there."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    written = generate(study.lm, study.prompts, hk.capture(study.sites), **settings)
    for row, length in enumerate(written.lengths):
        text = forward(study.lm, [written.tokens[row, : length - 1].tolist()], hk.capture(study.sites))
        for site in study.sites:
            if site.name not in WRITTEN:
                continue
            expected = text.captured(site).by_place[0]
            found = written.captured(site).by_place[row, : expected.shape[0]]
            yield Finding(site.name, compared(site, found, expected), READ * study.limit)
        start = written.prompt_lengths[row] - 1
        yield Finding("logits", apart(written.logits[row], text.logits[0, start:]), READ * study.limit)


@law("without cache", *EDITED_WRITING)
def _without_cache(study: Study) -> Iterator[Finding]:
    """An edit of the prompt, of what is written, or of k and v gives the same logits with the cache and without."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    layer = study.layers[len(study.layers) // 2]
    for name in EDITED_WRITING:
        if name in study.lm.layout.names and study.lm.layout.find(name, layer):
            edits = [hk.scale(Site(name, layer), 1.5, pos=slice(0, -1)), hk.ban(0)]
            found = generate(study.lm, study.prompts, *edits, use_cache=True, **settings)
            expected = generate(study.lm, study.prompts, *edits, use_cache=False, **settings)
            real = torch.arange(found.logits.shape[-1]) != 0
            yield Finding(name, apart(found.logits[..., real], expected.logits[..., real]), 5 * study.limit)


@law("rows", "resid_post")
def _rows(study: Study) -> Iterator[Finding]:
    """Rows with different hooks in one batch are single runs."""
    layer = study.layers[len(study.layers) // 2]
    site = Site("resid_post", layer)
    vector = study.vector(site)
    edits: list[Callable[[int], hk.Hook]] = [
        lambda row: hk.steer(site, vector, rows=row, pos=-1),
        lambda row: hk.ablate(site, rows=row, pos=0),
        lambda row: hk.force(5, rows=row),
    ]
    together = study.logits(*(edit(row) for row, edit in enumerate(edits)))
    for row, edit in enumerate(edits):
        length = study.plain.lengths[row]
        alone = forward(study.lm, [study.plain.tokens[row, :length].tolist()], edit(0))
        yield Finding("resid_post", apart(together[row, :length], alone.logits[0]), 3 * study.limit)


@law("left as found")
def _left_as_found(study: Study) -> Iterator[Finding]:
    """After a return and after an exception the model has the hooks and attributes that it had."""

    class Ended(Exception):
        pass

    def end(values: Tensor) -> Tensor:
        raise Ended

    before = _belongings(study.lm)
    with suppress(Ended):
        study.logits(hk.capture(study.sites), hk.edit(Site("resid_post", study.layers[-1]), end))
    yield Finding("", float(_belongings(study.lm) != before), 0.0)


def _belongings(lm: LM) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (*(len(getattr(module, kind)) for kind in kinds), *sorted(map(hash, module.__dict__)))
        for module in lm.root.modules()
    ]
