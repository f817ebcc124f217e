"""Laws of a model that is only looked at.

Laws of a model that is edited.

Laws of a model that reads batches and writes.

hk.prove: every law, tried on a model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pandas as pd
import torch
from torch import Tensor

from ..arguments import checks_arguments, whole_numbers
from ..errors import HookkitError
from ..hooks.ablation import ablate, patch
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import edit, scale, steer
from ..hooks.logits import ban, force
from ..models.lm import LM
from ..models.prompts import as_batch
from ..models.sites import AXES, LOGITS, SQUARE, Site
from ..runs.forward import forward
from ..runs.generate import generate
from ..runs.manager import attach
from .study import Finding, Law, Study, apart, compared, law, of_each_kind, some_prompts


@law("nothing", "logits")
def _nothing(study: Study) -> Iterator[Finding]:
    """Without hooks, logits are those of plain transformers, to the bit."""
    batch = as_batch(study.lm, study.prompts)
    with torch.no_grad():
        expected = study.lm.model(**batch.inputs(study.lm), use_cache=False).logits
    found = study.plain.logits
    same = [
        torch.equal(found[row, :length], expected[row, :length])
        for row, length in enumerate(batch.lengths)
    ]
    worst = max(
        apart(found[row, :length], expected[row, :length])
        for row, length in enumerate(batch.lengths)
    )
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
            for row, length in enumerate(
                study.run.lengths
            ):  # a row is padded with zeros, which a bias moves
                written = study.written(values[row : row + 1, :length], source, target)
                yield Finding(
                    name, apart(written, study.run[target][row : row + 1, :length]), study.limit
                )


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
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool).triu(1)[
            : pattern.shape[-2], : pattern.shape[-1]
        ]
        yield Finding(
            "pattern", float(pattern.masked_select(later.to(pattern.device)).abs().sum()), 0.0
        )
        sums = pattern.sum(-1).cpu()[study.run.mask.cpu()[:, None].expand(-1, pattern.shape[1], -1)]
        yield Finding("pattern", max(0.0, float(sums.max()) - 1), study.limit)
        yield Finding("pattern", float(sums.min()), 0.0, at_least=True)


REACHES = 1e-6  # of the largest logit: what an edit has to change at least
STEERED = tuple(name for name in AXES if name not in SQUARE and name != "experts")


@law("identity", *AXES)
def _identity(study: Study) -> Iterator[Finding]:
    """A run patched with its own values is the same run, to the bit."""
    study = study.few
    for site in study.sites:
        found = study.logits(patch(site, study.run))
        same = torch.equal(found, study.plain.logits)
        yield Finding(site.name, 0.0 if same else apart(found, study.plain.logits), 0.0)


@law("reaches", *AXES)
def _reaches(study: Study) -> Iterator[Finding]:
    """Zeroing a site changes the output (halving scores; for chosen experts, the next ones)."""
    study = study.few
    for site in study.sites:
        change: Hook = ablate(site)
        if site.name == "scores":
            change = scale(site, 0.5)
        elif site.name == "experts":
            experts = study.lm.sizes["expert"] or 2
            change = edit(site, lambda chosen, experts=experts: (chosen + 1) % experts)
        yield Finding(
            site.name, apart(study.logits(change), study.plain.logits), REACHES, at_least=True
        )


@law("there and back", *STEERED)
def _back(study: Study) -> Iterator[Finding]:
    """Steered by a vector and by its opposite, a model says what it said."""
    study = study.few
    for site in study.sites:
        if site.name in STEERED:
            vector = study.vector(site)
            found = study.logits(steer(site, vector), steer(site, -vector))
            yield Finding(site.name, apart(found, study.plain.logits), 5 * study.limit)


@law("one stream", "attn_out", "mlp_out", "resid_post")
def _one_stream(study: Study) -> Iterator[Finding]:
    """A vector added to what attention or the MLP gives is a vector added to the stream behind it."""
    study = study.few

    def same(first: Site, second: Site) -> Finding:
        vector = study.vector(Site("resid_post", first.layer))
        found, expected = study.logits(steer(first, vector)), study.logits(steer(second, vector))
        return Finding(first.name, apart(found, expected), 5 * study.limit)

    for layer in study.having("attn_out", "resid_mid"):
        yield same(Site("attn_out", layer), Site("resid_mid", layer))
    for layer in study.having("mlp_out"):
        yield same(Site("mlp_out", layer), Site("resid_post", layer))
        if "resid_mid" not in study.lm.layout.names and study.having("attn_out"):
            yield same(Site("attn_out", layer), Site("resid_post", layer))
    for layer in range(study.lm.n_layers - 1):
        if layer in study.layers:
            yield same(Site("resid_post", layer), Site("resid_pre", layer + 1))


@law("all heads", "z", "mlp_post")
def _all_heads(study: Study) -> Iterator[Finding]:
    """Zeroing every head, or every neuron, leaves of what is added to the stream what a projection makes of zero."""
    study = study.few
    for name, added in (("z", "attn_out"), ("mlp_post", "mlp_out")):
        for layer in study.having(name, added):
            source, target = Site(name, layer), Site(added, layer)
            values = study.run[source]
            nothing = torch.zeros_like(values.flatten(2) if name == "z" else values)[:1, :1]
            rest = study.written(nothing, source, target)[0, 0]
            heads = values.shape[2] if name == "z" else 0
            off = (
                [ablate([Site(name, layer, head) for head in range(heads)])]
                if heads
                else [ablate(source)]
            )
            expected = study.logits(ablate(target, to=rest))
            yield Finding(name, apart(study.logits(*off), expected), 5 * study.limit)


@law("one head", "pattern")
def _one_head(study: Study) -> Iterator[Finding]:
    """Zeroing one head's pattern is zeroing its z."""
    study = study.few
    for layer in study.having("pattern", "z"):
        found = study.logits(ablate(Site("pattern", layer, 1)))
        expected = study.logits(ablate(Site("z", layer, 1)))
        yield Finding("pattern", apart(found, expected), 5 * study.limit)


NEW = 3  # tokens that are generated
READ = 10  # times the limit: what reading in another shape may cost, since a pattern makes much of little
BY_ROW = tuple(
    name for name in AXES if name != "experts"
)  # a tie may fall either way; their weights are compared
WRITTEN = tuple(
    name for name in BY_ROW if name not in LOGITS
)  # generate asks these for a prompt's last position only
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
        alone = forward(study.lm, [list(row)], capture(sites))
        for site in sites:
            if site.name not in BY_ROW:
                continue
            expected = alone.captured(site).by_place[0]
            for together in (study.run[site], padded_left[site]):
                whole_square = site.name in SQUARE
                found = (together.transpose(1, 2) if whole_square else together)[
                    number, : expected.shape[0]
                ]
                yield Finding(site.name, compared(site, found, expected), READ * study.limit)


def _left(study: Study, batch: dict[str, list[list[int]]], sites: list[Site]) -> dict[Site, Tensor]:
    """What a forward by plain transformers of a batch padded on the left has at every site."""
    ids, mask = (
        torch.tensor(batch[name], device=study.lm.device)
        for name in ("input_ids", "attention_mask")
    )
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in study.lm.takes:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(study.lm, capture(sites)) as manager, torch.no_grad():
        study.lm.model(**given, use_cache=False)
    return {site: manager[site] for site in sites}


@law("writing", *WRITTEN, "logits")
def _writing(study: Study) -> Iterator[Finding]:
    """While generating, with the cache, every site has what a forward over the whole text has there."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    written = generate(study.lm, study.prompts, capture(study.sites), **settings)
    for row, length in enumerate(written.lengths):
        text = forward(study.lm, [written.tokens[row, : length - 1].tolist()], capture(study.sites))
        for site in study.sites:
            if site.name not in WRITTEN:
                continue
            expected = text.captured(site).by_place[0]
            found = written.captured(site).by_place[row, : expected.shape[0]]
            yield Finding(site.name, compared(site, found, expected), READ * study.limit)
        start = written.prompt_lengths[row] - 1
        yield Finding(
            "logits", apart(written.logits[row], text.logits[0, start:]), READ * study.limit
        )


@law("without cache", *EDITED_WRITING)
def _without_cache(study: Study) -> Iterator[Finding]:
    """An edit of the prompt, of what is written, or of k and v gives the same logits with the cache and without."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    layer = study.layers[len(study.layers) // 2]
    for name in EDITED_WRITING:
        if name in study.lm.layout.names and study.lm.layout.find(name, layer):
            edits = [scale(Site(name, layer), 1.5, pos=slice(0, -1)), ban(0)]
            found = generate(study.lm, study.prompts, *edits, use_cache=True, **settings)
            expected = generate(study.lm, study.prompts, *edits, use_cache=False, **settings)
            real = torch.arange(found.logits.shape[-1]) != 0
            yield Finding(
                name, apart(found.logits[..., real], expected.logits[..., real]), 5 * study.limit
            )


@law("rows", "resid_post")
def _rows(study: Study) -> Iterator[Finding]:
    """Rows with different hooks in one batch are single runs."""
    layer = study.layers[len(study.layers) // 2]
    site = Site("resid_post", layer)
    vector = study.vector(site)
    edits: list[Callable[[int], Hook]] = [
        lambda row: steer(site, vector, rows=row, pos=-1),
        lambda row: ablate(site, rows=row, pos=0),
        lambda row: force(5, rows=row),
    ]
    together = study.logits(*(make(row) for row, make in enumerate(edits)))
    for row, make in enumerate(edits):
        length = study.plain.lengths[row]
        alone = forward(study.lm, [study.plain.tokens[row, :length].tolist()], make(0))
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
        study.logits(capture(study.sites), edit(Site("resid_post", study.layers[-1]), end))
    yield Finding("", float(_belongings(study.lm) != before), 0.0)


def _belongings(lm: LM) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (*(len(getattr(module, kind)) for kind in kinds), *sorted(map(hash, module.__dict__)))
        for module in lm.root.modules()
    ]


LAWS: list[Law] = [
    _nothing,
    _looking,
    _sum,
    _projection,
    _unembedding,
    _pattern,
    _identity,
    _reaches,
    _back,
    _one_stream,
    _all_heads,
    _one_head,
    _batch,
    _writing,
    _without_cache,
    _rows,
    _left_as_found,
]
UNTRIED = "this law ended in an error, and was not tried here to its end"


def _blocks(lm: LM, layers: Iterable[int] | None) -> list[int] | None:
    """The blocks to try, each of which the model has."""
    if layers is None:
        return None
    blocks = whole_numbers(layers, "layers", least=0, meaning="the blocks to try,")
    for block in blocks:
        lm.place(Site("resid_post", block))  # raises where there is none
    return blocks


@checks_arguments
def prove(
    lm: LM,
    *,
    prompts: "list[list[int]] | list[str] | None" = None,
    layers: Iterable[int] | None = None,
) -> pd.DataFrame:
    """The laws on a model, one row for each law and site (the worst of the blocks that were tried).

    Columns: law, site, difference (a part of the largest value there), limit, holds, note (the reason, where the family
    is an exception, or what was raised). A law that raised was not tried to its end, and holds at none of the sites
    that it names. `prompts` are three or more of different lengths; ids from the whole vocabulary if left out.
    `layers` are the blocks to try: the first, middle and last of each kind if left out.

    >>> prove(tiny("gpt_neox"))["holds"].all()
    np.True_
    """
    study = Study(
        lm, some_prompts(lm) if prompts is None else prompts, of_each_kind(lm, _blocks(lm, layers))
    )
    rows = []
    for one in LAWS:
        found = _checked(one, study)
        for site in dict.fromkeys(each.site for each in found):
            worst = max((each for each in found if each.site == site), key=_badness)
            excused = lm.family.exceptions.get(one.name) or lm.family.exceptions.get(
                f"{one.name} {site}"
            )
            rows.append(
                {
                    "law": one.name,
                    "site": site,
                    "difference": worst.difference,
                    "limit": worst.limit,
                    "holds": worst.holds,
                    "note": f"exception: {excused}" if excused and not worst.holds else worst.note,
                }
            )
    return pd.DataFrame(rows, columns=["law", "site", "difference", "limit", "holds", "note"])


def _badness(finding: Finding) -> tuple[bool, float]:
    number = finding.difference if finding.difference == finding.difference else float("inf")
    return not finding.holds, -number if finding.at_least else number


def _checked(law: Law, study: Study) -> list[Finding]:
    """What a law finds. If it raises, it holds nowhere: of a site that it came to, some block or row may be untried."""
    found: list[Finding] = []
    try:
        found.extend(law.check(study))
    except (HookkitError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        said = str(error).split("\n")[0][:300]
        found.append(
            Finding("", float("nan"), 0.0, f"could not be tried: {type(error).__name__}: {said}")
        )
        failed = {each.site for each in found if not each.holds}
        there = {site.name for site in study.sites} - failed
        found += [Finding(site, float("nan"), 0.0, UNTRIED) for site in law.sites if site in there]
    return found
