"""hk.check_laws: checks on a model that hookkit keeps its laws.

The laws come in three groups: a model that is only observed, a model that is edited, and a model
that reads batches and generates. The function of a law yields a `Finding` for every site that it
checks. `LAWS` lists the laws, and `check_laws` runs them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..arguments import check_arguments, check_integers
from ..errors import HookkitError
from ..hooks.ablation import ablate, patch
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import edit, scale, steer
from ..hooks.logit_shifts import ban
from ..hooks.logits import force
from ..models.experts import NEURONS
from ..models.lm import LM
from ..models.padding import can_pad, forward_inputs, padding_scheme
from ..models.prompt_row import PromptRow, Row
from ..models.prompts import as_batch, continue_row
from ..models.sites import AXES, LOGIT_SITES, QUERY_KEY_SITES, SITES_WITHOUT_LAYER, ModuleSite, Site
from ..models.tower_images import VALUES
from ..runs.forward import forward
from ..runs.generate import generate
from ..runs.manager import attach
from ..runs.run import Run
from .image_prompts import image_prompts
from .study import (
    EDITED_SITES,
    Finding,
    Law,
    Study,
    default_prompts,
    last_layer_read,
    relative_difference,
    representative_layers,
)

OUTPUTS = (
    ("z", "attn_out"),
    ("cross_z", "cross_out"),
    ("mlp_post", "mlp_out"),
)  # a projection's input, and its output


def _sites_except(*names: str) -> tuple[str, ...]:
    return tuple(name for name in AXES if name not in names)


# A model that is only observed.


def _no_hooks(study: Study) -> Iterator[Finding]:
    """Without hooks, the logits equal those of plain transformers, bit for bit."""
    batch = as_batch(study.lm, study.prompts)
    with torch.no_grad():
        expected = study.lm.model(**batch.inputs(study.lm), use_cache=False).logits
    actual = study.plain_run.logits
    for row, length in enumerate(batch.lengths):
        difference = relative_difference(actual[row, :length], expected[row, :length])
        yield Finding("logits", difference, 0.0)


def _captures(study: Study) -> Iterator[Finding]:
    """Capturing every site does not change the logits, bit for bit."""
    difference = relative_difference(study.run.logits, study.plain_run.logits)
    yield Finding("" if study.stack else "logits", difference, 0.0)


def _residual_sum(study: Study) -> Iterator[Finding]:
    """resid_pre + attn_out + mlp_out is resid_post, and resid_pre + attn_out is resid_mid.

    In an encoder-decoder, cross_out is added between attn_out and mlp_out. A block of one part adds
    only this part. Where a family normalises the stream itself, each sum is compared after that
    norm.
    """
    for layer in study.layers_with("resid_pre", "resid_post"):
        has_middle = layer in study.layers_with("resid_mid")
        added = [name for name in ("attn_out", "mlp_out") if layer in study.layers_with(name)]
        total = study.value("resid_pre", layer)
        if "attn_out" in added:
            total = total + study.value("attn_out", layer)
            total = study.norm_stream(total, study.site("resid_mid", layer))
            if has_middle:
                yield study.compare("resid_mid", total, study.value("resid_mid", layer))
        if layer in study.layers_with("cross_out"):
            total = total + study.value("cross_out", layer)
        if "mlp_out" in added:
            total = total + study.value("mlp_out", layer)
        if len(added) == 2 or (added and not has_middle):
            total = study.norm_stream(total, study.site("resid_post", layer))
            for name in ("resid_pre", *added, "resid_post"):
                yield study.compare(name, total, study.value("resid_post", layer))
    yield from _cross_sum(study)


def _cross_sum(study: Study) -> Iterator[Finding]:
    """Compares resid_mid + cross_out with cross_mid."""
    for layer in study.layers_with("resid_mid", "cross_out", "cross_mid"):
        after_cross = study.value("resid_mid", layer) + study.value("cross_out", layer)
        yield study.compare("cross_mid", after_cross, study.value("cross_mid", layer))


def _projections(study: Study) -> Iterator[tuple[Site, Site, Tensor]]:
    """Yields z with attn_out, and mlp_post with mlp_out, and the values that are projected."""
    for name, output_name in OUTPUTS:
        for layer in study.layers_with(name, output_name):
            source = study.site(name, layer)
            if study.lm.location(source).side == "inside":  # of experts; see `_experts`
                continue
            yield source, study.site(output_name, layer), study.run[source].flatten(2)


def _output_projection(study: Study) -> Iterator[Finding]:
    """The output projection of z is attn_out, and that of mlp_post is mlp_out."""
    for source, target, values in _projections(study):
        # Each row by itself: padding is zero, and a bias would change it.
        for row, length in enumerate(study.lengths):
            projected = study.project_to_stream(values[row : row + 1, :length], source, target)
            expected = study.run[target][row : row + 1, :length]
            yield study.compare(source.name, projected, expected)


def _experts(study: Study) -> Iterator[Finding]:
    """The neurons of the chosen experts, through their weights, give the output of the experts."""
    for layer in study.layers_with("mlp_post", "experts", "expert_weights"):
        sites = [study.site(name, layer) for name in ("mlp_post", "experts", "expert_weights")]
        location = study.lm.location(sites[0])
        if location.side != "inside" or study.lm.ranks is not None:
            continue
        path, output = location.path, ModuleSite(location.path)
        run = forward(study.lm, study.prompts, capture([*sites, output]))
        mask = study.mask.to(run[output].device)
        with torch.no_grad():
            actual = study.weigh_experts(path, *(run[site][mask] for site in sites))
        yield study.compare("mlp_post", actual, run[output].unflatten(0, mask.shape)[mask])


def _unembedding(study: Study) -> Iterator[Finding]:
    """The unembedding of final_norm is lm_head."""
    if {"final_norm", "lm_head"} <= set(study.layout.names):
        head = study.lm.submodule(study.lm.location(study.site("lm_head")).path)
        for row, length in enumerate(study.run.lengths):
            with torch.no_grad():
                actual = head(study.run["final_norm"][row : row + 1, :length])
            expected = study.run["lm_head"][row : row + 1, :length]
            yield study.compare("final_norm", actual.float(), expected.float())


def _attention_pattern(study: Study) -> Iterator[Finding]:
    """A pattern sums to 1 (to less with an attention sink) and is 0 at keys after the query.

    In a masked language model, an encoder or a tower, a query sees the keys after it too.
    """
    for name, layer in itertools.product(("pattern", "cross_pattern"), study.layers):
        if not study.layout.find(name, layer):
            continue
        pattern = study.value(name, layer).float()
        is_later = torch.ones(pattern.shape[-2:], dtype=torch.bool).triu(1).to(pattern.device)
        if name == "pattern":
            later_sum = float(pattern.masked_select(is_later).abs().sum())
            yield Finding(name, later_sum, 0.0, at_least=study.reads_ahead)
        is_text = study.mask[:, None].expand(-1, pattern.shape[1], -1)
        sums = pattern.sum(-1).cpu()[is_text]
        yield Finding(name, max(0.0, float(sums.max()) - 1), study.tolerance)
        yield Finding(name, float(sums.min()), 0.0, at_least=True)


# A model that is edited.

MIN_CHANGE = 1e-6  # the smallest change of the logits by an edit, as a fraction of the largest one
STEERED = _sites_except("experts", *QUERY_KEY_SITES)


def _patch_with_itself(study: Study) -> Iterator[Finding]:
    """Patching a run with its own values does not change it, bit for bit."""
    study = study.without_first_prompt
    for site in study.sites:
        patched = study.logits(patch(site, study.run))
        yield Finding(site.name, relative_difference(patched, study.plain_run.logits), 0.0)


def _edit_has_effect(study: Study) -> Iterator[Finding]:
    """Zeroing a site changes the logits. Scores are halved; experts are replaced by the next."""
    study = study.without_first_prompt
    for site in study.sites:
        hook: Hook = ablate(site)
        if site.name == "scores":
            hook = scale(site, 0.5)
        elif site.name == "experts":
            n_experts = study.lm.sizes["expert"] or 2
            hook = edit(site, lambda indices, count=n_experts: (indices + 1) % count)
        difference = relative_difference(study.logits(hook), study.plain_run.logits)
        yield Finding(site.name, difference, MIN_CHANGE, at_least=True)


def _opposite_vectors(study: Study) -> Iterator[Finding]:
    """Steering by a vector and by its opposite gives the original logits."""
    study = study.without_first_prompt
    for site in study.sites_named(STEERED):
        vector = study.random_vector(site)
        actual = study.logits(steer(site, vector), steer(site, -vector))
        yield study.compare(site.name, actual, study.plain_run.logits, 5)


def _steered_stream(study: Study) -> Iterator[Finding]:
    """Steering attn_out or mlp_out is the same as steering the residual stream after it.

    It is another thing where a norm of the stream stands between the two.
    """
    study = study.without_first_prompt
    for first, second in _equivalent_sites(study):
        vector = study.random_vector(study.site("resid_post", first.layer))
        actual, expected = study.logits(steer(first, vector)), study.logits(steer(second, vector))
        yield study.compare(first.name, actual, expected, 5)


def _equivalent_sites(study: Study) -> Iterator[tuple[Site, Site]]:
    """Yields pairs of sites at which the same vector has the same effect."""
    norms = study.layout.family.stream_norms
    with_middle = study.layers_with("resid_mid")
    for layer in study.layers_with("attn_out", "resid_post"):
        after = "resid_mid" if layer in with_middle else "resid_post"
        if after not in norms:
            yield study.site("attn_out", layer), study.site(after, layer)
    for layer in study.layers_with("mlp_out", "resid_post"):
        if "resid_post" in norms:
            continue
        yield study.site("mlp_out", layer), study.site("resid_post", layer)
    last = study.last_layer
    for layer in study.layers_with("resid_post"):
        if layer != last:
            yield study.site("resid_post", layer), study.site("resid_pre", layer + 1)


def _all_heads(study: Study) -> Iterator[Finding]:
    """Zeroing all heads, or all neurons, leaves only the projection of zero: its bias."""
    study = study.without_first_prompt
    for source, target, values in _projections(study):
        sites = [source]
        if source.name == "z":
            sites = [replace(source, head=head) for head in range(study.run[source].shape[2])]
        bias = study.project_to_stream(torch.zeros_like(values)[:1, :1], source, target)[0, 0]
        expected = study.logits(ablate(target, to=bias))
        yield study.compare(source.name, study.logits(ablate(sites)), expected, 5)


def _one_head(study: Study) -> Iterator[Finding]:
    """Zeroing the pattern of a head is the same as zeroing its z."""
    study = study.without_first_prompt
    for layer in study.layers_with("pattern", "z"):
        actual = study.logits(ablate(study.site("pattern", layer, 1)))
        expected = study.logits(ablate(study.site("z", layer, 1)))
        yield study.compare("pattern", actual, expected, 5)


# A model that reads batches and generates.

GENERATION = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
# Inputs of another shape cost accuracy, which a pattern amplifies: so many times the tolerance.
SHAPE_FACTOR = 10
# A tie between experts may be resolved either way; expert_weights are compared instead.
BY_ROW = _sites_except("experts")
# generate computes the other sites at the last position of the prompt only.
GENERATED_SITES = _sites_except("experts", *LOGIT_SITES)
CACHED_EDITS = ("resid_post", "k", "v", "k_rot", "q_rot", "z")


def _padded_batch(study: Study) -> Iterator[Finding]:
    """A row has the same values alone and in a batch padded on the right or left, at every site."""
    rows = as_batch(study.lm, study.prompts).rows
    padded_values: list[Run | dict[Site, Tensor]] = [study.run]
    if can_pad(study.lm, "left", rows):
        padded_values.append(_left_padded_values(study, rows))
    for number, row in enumerate(rows):
        alone = forward(study.lm, [row], capture(study.sites))
        for site, values in itertools.product(study.sites_named(BY_ROW), padded_values):
            expected = alone.captured(site).by_position[0]
            actual = values[site]
            if site.name in QUERY_KEY_SITES:
                actual = actual.transpose(1, 2)
            actual = actual[number, : expected.shape[0]]
            same = _same_choices(site, number, values, alone)
            yield study.compare_site(site, actual[same], expected[same], SHAPE_FACTOR)


def _same_choices(
    site: Site, row: int, values: Run | dict[Site, Tensor], alone: Run
) -> Tensor | slice:
    """Returns where a token has the same experts in a batch's row and alone, for their neurons.

    A tie between experts may be resolved either way. For other sites it is everywhere.
    """
    experts = replace(site, name="experts")
    if site.name not in NEURONS or experts not in alone.sites:
        return slice(None)
    expected = alone[experts][0]
    return (values[experts][row, : len(expected)] == expected).all(-1)


def _left_padded_values(study: Study, rows: Sequence[Row]) -> dict[Site, Tensor]:
    """Returns the captured values of a left-padded batch in a call of the plain model."""
    ids = [torch.tensor(row, device=study.lm.device) for row in rows]
    ones = list(map(torch.ones_like, ids))
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    padded_ids = pad_sequence(ids, batch_first=True, padding_side="left")
    inputs = {"input_ids": padded_ids, "attention_mask": mask}
    # Some models give each patch of an image its position themselves.
    offset = padding_scheme(study.lm, "left", rows).positions
    if offset is not None:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + offset
    inputs = forward_inputs(study.lm, rows, inputs, mask.shape[1], "left")
    with attach(study.lm, capture(study.sites)) as manager, torch.no_grad():
        study.lm.model(**inputs, use_cache=False)
    return {site: manager[site] for site in study.sites}


def _generated_values(study: Study) -> Iterator[Finding]:
    """With the cache, generation has the values of a forward pass over the text, at every site."""
    generated = generate(study.lm, study.generated_prompts, capture(study.sites), **GENERATION)
    prompts = as_batch(study.lm, study.prompts).rows
    for row, length in enumerate(generated.lengths):
        written = generated.tokens[row, generated.prompt_lengths[row] : length - 1].tolist()
        alone = forward(
            study.lm, [continue_row(study.lm, prompts[row], written)], capture(study.sites)
        )
        for site in study.sites_named(GENERATED_SITES):
            expected = alone.captured(site).by_position[0]
            actual = generated.captured(site).by_position[row, : expected.shape[0]]
            same = _same_choices(site, row, generated, alone)
            yield study.compare_site(site, actual[same], expected[same], SHAPE_FACTOR)
        expected = alone.logits[0, generated.prompt_lengths[row] - 1 :]
        yield study.compare("logits", generated.logits[row], expected, SHAPE_FACTOR)


def _edit_without_cache(study: Study) -> Iterator[Finding]:
    """An edit of the prompt and the new text gives the same logits with and without the cache."""
    layer = study.layers[len(study.layers) // 2]
    for name in CACHED_EDITS:
        if layer in study.layers_with(name):
            hooks = [scale(study.site(name, layer), 1.5, pos=slice(0, -1)), ban(0)]
            prompts = study.generated_prompts
            cached = generate(study.lm, prompts, *hooks, use_cache=True, **GENERATION)
            uncached = generate(study.lm, prompts, *hooks, use_cache=False, **GENERATION)
            # token 0 is banned
            yield study.compare(name, cached.logits[..., 1:], uncached.logits[..., 1:], 5)


def _hooks_by_row(study: Study) -> Iterator[Finding]:
    """Rows with different hooks in one batch have the logits of single runs."""
    if not any(map(study.layers_with, EDITED_SITES)):
        return
    site = study.edited_site(study.layers[len(study.layers) // 2])
    vector = study.random_vector(site)
    makers: list[Callable[[int], Hook]] = [
        lambda row: steer(site, vector, rows=row, pos=-1),
        lambda row: ablate(site, rows=row, pos=0),
        lambda row: force(5, rows=row, pos=-1),
    ]
    batch_logits = study.logits(*(make(row) for row, make in enumerate(makers)))
    prompts = as_batch(study.lm, study.prompts).rows
    for row, make in enumerate(makers):
        alone = forward(study.lm, [prompts[row]], make(0))
        together = batch_logits[row, : len(prompts[row])]
        yield study.compare(site.name, together, alone.logits[0], 3)


def _model_is_restored(study: Study) -> Iterator[Finding]:
    """After an exception the model has the hooks and attributes that it had before."""

    class Stop(Exception):
        pass

    def stop(values: Tensor) -> Tensor:
        raise Stop

    before = _module_state(study.lm)
    last_sites = study.sites_named(("resid_post", "lm_head"))
    with suppress(Stop):
        study.logits(capture(study.sites), edit(last_sites[0], stop))
    yield Finding("", float(_module_state(study.lm) != before), 0.0)


def _module_state(lm: LM) -> list[tuple[int, ...]]:
    """Returns the number of hooks and the names of the attributes (hashed) of every module."""
    states: list[tuple[int, ...]] = []
    for module in lm.root.modules():
        n_hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        states.append((*n_hooks, *sorted(map(hash, module.__dict__))))
    return states


SUMMED = ("resid_pre", "attn_out", "resid_mid", "cross_mid", "mlp_out", "resid_post")
LAWS = [
    Law("nothing", _no_hooks, ("logits",), of_text=True),
    Law("looking", _captures, ("logits",)),
    Law("sum", _residual_sum, SUMMED),
    Law("projection", _output_projection, ("z", "cross_z", "mlp_post")),
    Law("experts", _experts, ("mlp_post",)),
    Law("unembedding", _unembedding, ("final_norm",)),
    Law("pattern", _attention_pattern, ("pattern", "cross_pattern")),
    Law("identity", _patch_with_itself, tuple(AXES)),
    Law("reaches", _edit_has_effect, tuple(AXES)),
    Law("there and back", _opposite_vectors, STEERED),
    Law("one stream", _steered_stream, ("attn_out", "mlp_out", "resid_post")),
    Law("all heads", _all_heads, ("z", "mlp_post")),
    Law("one head", _one_head, ("pattern",)),
    Law("batch", _padded_batch, BY_ROW),
    Law("writing", _generated_values, (*GENERATED_SITES, "logits"), causal=True),
    Law("without cache", _edit_without_cache, CACHED_EDITS, causal=True),
    Law("rows", _hooks_by_row, EDITED_SITES),
    Law("left as found", _model_is_restored, (), of_text=True),
]
UNFINISHED = "this law ended in an error, and was not checked at this site to the end"


@check_arguments
def check_laws(
    lm: LM,
    *,
    prompts: list[list[int]] | list[str] | None = None,
    layers: Iterable[int] | None = None,
) -> pd.DataFrame:
    """Returns the laws checked on a model, one row for each law and site: the worst of its layers.

    Columns: law, site, difference (a fraction of the largest value), limit, holds, note (the reason
    of the family's exception, or the error that was raised). A law that raised an error holds at
    none of its sites.
    `prompts` are three or more of different lengths; by default ids from the whole vocabulary.
    `layers` are the layers to check; by default the first, middle and last of each kind.
    A masked language model, such as BERT, has no row of the laws about writing text. The sites of
    an encoder, or of a tower that reads images or sound, are checked by the laws that are not about
    text; those of a tower only if the prompts have images, which are drawn if there are no prompts.

    >>> check_laws(tiny("gpt_neox"))["holds"].all()
    np.True_
    """
    studies = [Study(lm, prompts or default_prompts(lm), _layers_to_check(lm, layers))]
    for stack in lm.layout.stacks:
        studies += _study_of_stack(lm, stack, prompts, layers)
    rows = []
    for study, law in itertools.product(studies, LAWS):
        if _applies(law, study):
            rows += [_table_row(study, law, finding) for finding in _worst_by_site(law, study)]
    return pd.DataFrame(rows, columns=["law", "site", "difference", "limit", "holds", "note"])


def _applies(law: Law, study: Study) -> bool:
    """False if a law needs a causal model and this one reads ahead, or a stack of text."""
    return not (law.causal and study.reads_ahead) and not (law.of_text and study.stack)


def _study_of_stack(
    lm: LM, stack: str, prompts: list | None, layers: Iterable[int] | None
) -> list[Study]:
    """Returns the study of another stack; none if the prompts have nothing for it to read."""
    layout = lm.layout.stacks[stack]
    if prompts is None:
        prompts = image_prompts(lm, stack) if stack in lm.towers else default_prompts(lm)
    if stack in lm.towers:
        prompts = _prompts_for_tower(lm, stack, prompts)
    last = last_layer_read(layout)
    numbers = representative_layers(layout) if layers is None else layers
    numbers = [layer for layer in numbers if layer <= last]
    return [Study(lm, prompts, numbers, stack)] if prompts and numbers else []


def _prompts_for_tower(lm: LM, stack: str, prompts: list) -> list[Row]:
    """Returns the rows of the prompts that have an input which the tower reads."""
    rows: list[Row] = []
    for row in as_batch(lm, prompts).rows:
        if isinstance(row, PromptRow) and VALUES[stack][0] in row.inputs:
            rows.append(row)
    return rows


def _layers_to_check(lm: LM, layers: Iterable[int] | None) -> list[int]:
    if layers is None:
        return representative_layers(lm.layout)
    numbers = check_integers(layers, "layers", least=0, meaning="the blocks to try,")
    names = (name for name in lm.layout.names if name not in SITES_WITHOUT_LAYER)
    name = next(names, "resid_post")
    for layer in numbers:
        lm.location(Site(name, layer))  # raises for a layer that the model does not have
    return numbers


def _worst_by_site(law: Law, study: Study) -> Iterable[Finding]:
    """Returns the worst finding of a law at each site."""
    worst: dict[str, Finding] = {}
    for finding in _check_law(law, study):
        worst[finding.site] = max(worst.get(finding.site, finding), finding, key=_severity)
    return worst.values()


def _table_row(study: Study, law: Law, finding: Finding) -> dict[str, object]:
    exceptions, note = study.layout.family.exceptions, finding.note
    reason = exceptions.get(law.name) or exceptions.get(f"{law.name} {finding.site}")
    if reason and not finding.holds:
        note = f"exception: {reason}"
    return {
        "law": law.name,
        "site": ".".join(filter(None, (study.stack, finding.site))),
        "difference": finding.difference,
        "limit": finding.limit,
        "holds": finding.holds,
        "note": note,
    }


def _severity(finding: Finding) -> tuple[bool, float]:
    """Returns a value that is larger for a worse finding; nan counts as infinite."""
    difference = math.inf if math.isnan(finding.difference) else finding.difference
    return not finding.holds, -difference if finding.at_least else difference


def _check_law(law: Law, study: Study) -> list[Finding]:
    """Returns the findings of a law.

    A law that raises an error holds at none of its sites, since some layer or row may be unchecked.
    """
    findings: list[Finding] = []
    try:
        findings.extend(law.check(study))
    except (HookkitError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0][:300]
        note = f"could not be tried: {type(error).__name__}: {reason}"
        failed = {finding.site for finding in findings if not finding.holds}
        unfinished = {site.name for site in study.sites_named(law.sites)} - failed
        findings.append(Finding("", math.nan, 0.0, note))
        for name in sorted(unfinished, key=law.sites.index):
            findings.append(Finding(name, math.nan, 0.0, UNFINISHED))
    return findings
