"""The inputs of the laws, and the values that describe a law and its result.

A `Study` holds a model, prompts and the layers to check, and computes the forward passes that
several laws share. A `Law` has a name and the function that checks it. A `Finding` is the result of
a law at one site.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import BadPrompt, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..models.layout import Layout
from ..models.lm import LM
from ..models.named_positions import placeholder_ids
from ..models.padding import check_generation, padding_scheme
from ..models.prompts import as_batch, start_token
from ..models.sites import QUERY_KEY_SITES, SITES_WITHOUT_LAYER, Site
from ..models.views import is_hidden
from ..runs.dispatch import forward_of_site
from ..runs.forward import forward
from ..runs.run import Run

EDITED_SITES = ("resid_post", "mlp_in")
PROMPT_LENGTHS = (7, 2, 5)  # of the default prompts, in tokens
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference allowed in each dtype, as a fraction of the largest value."""


@dataclass(frozen=True, eq=False)
class Study:
    """A model with prompts, the layers to check, and the runs that several laws read.

    A call of `check_laws` owns it. Its runs are computed when they are first read, and kept.
    """

    lm: LM
    prompts: list
    layers: list[int]
    stack: str = ""  # the stack to check, such as "vision"; "" is the one that writes text

    @cached_property
    def without_first_prompt(self) -> "Study":
        """The same study without the first prompt, for laws with a forward pass for every site."""
        return Study(self.lm, self.prompts[1:], self.layers, self.stack)

    @property
    def layout(self) -> Layout:
        """The layout of the stack."""
        return self.lm.layout.stacks[self.stack] if self.stack else self.lm.layout

    @property
    def reads_ahead(self) -> bool:
        """True if a position sees those after it, as in a masked model, an encoder or a tower."""
        return self.lm.is_masked or bool(self.stack)

    @property
    def last_layer(self) -> int:
        """The last layer of the stack that the model's output depends on."""
        return last_layer_read(self.layout)

    def site(self, name: str, layer: int | None = None, head: int | None = None) -> Site:
        """Returns a site of the stack."""
        return Site(name, layer, head, self.stack)

    def value(self, name: str, layer: int) -> Tensor:
        """Returns the values at a site in a forward pass over the prompts."""
        return self.run[self.site(name, layer)]

    @cached_property
    def mask(self) -> Tensor:
        """True at the positions of each row of the stack, and False in the padding after them."""
        positions = self.run.captured(self.sites[0]).positions
        assert positions is not None
        return positions >= 0

    @cached_property
    def lengths(self) -> list[int]:
        """The number of positions of each row of the stack."""
        return self.mask.sum(1).tolist()

    @cached_property
    def sites(self) -> list[Site]:
        """The sites of the whole stack and of the layers to check."""
        layers = {None, *self.layers}
        sites = self.lm.expand(list(map(self.site, self.layout.names)))
        return [site for site in sites if isinstance(site, Site) and site.layer in layers]

    def sites_named(self, names: Collection[str]) -> list[Site]:
        """Returns the sites with one of these names."""
        return [site for site in self.sites if site.name in names]

    def layers_with(self, *names: str) -> list[int]:
        """Returns the layers to check that have all these sites."""
        layers = self.layers
        for name in names:
            layers = [layer for layer in layers if self.layout.find(name, layer)]
        return layers

    def edited_site(self, layer: int) -> Site:
        """Returns the site of a layer that a law edits which could take any site."""
        names = (name for name in EDITED_SITES if layer in self.layers_with(name))
        return self.site(next(names), layer)

    @cached_property
    def generated_prompts(self) -> list:
        """The prompts to generate from: one if the model reads padding on the left as text.

        `generate` then refuses several prompts, because they have several lengths.
        """
        try:
            rows = as_batch(self.lm, self.prompts).rows
            padding_scheme(self.lm, "left", rows)
            check_generation(self.lm, padded=True, chunk=None, width=0, rows=rows)
        except Unsupported:
            return self.prompts[:1]
        return self.prompts

    @cached_property
    def plain_run(self) -> Run:
        """A forward pass over the prompts without hooks."""
        return forward(self.lm, self.prompts)

    @cached_property
    def run(self) -> Run:
        """A forward pass over the prompts that captures every site."""
        return forward(self.lm, self.prompts, capture(self.sites))

    @cached_property
    def tolerance(self) -> float:
        """The largest relative difference allowed in the model's dtype."""
        return TOLERANCES.get(self.run[self.sites[0]].dtype, TOLERANCES[torch.float32])

    def logits(self, *hooks: Hook) -> Tensor:
        """Returns the logits of the prompts under these hooks."""
        return forward(self.lm, self.prompts, *hooks).logits

    def compare(self, site: str, actual: Tensor, expected: Tensor, factor: float = 1) -> "Finding":
        """Returns the finding of values that may differ by `factor` times the tolerance."""
        return Finding(site, relative_difference(actual, expected), factor * self.tolerance)

    def compare_site(
        self, site: Site, actual: Tensor, expected: Tensor, factor: float
    ) -> "Finding":
        """Returns the finding of the values at a site.

        Scores and patterns may have different numbers of keys. The keys that both have are
        compared, and those that the query cannot see count as zero.
        """
        if site.name not in QUERY_KEY_SITES:
            return self.compare(site.name, actual.float(), expected.float(), factor)
        width = min(actual.shape[-1], expected.shape[-1])
        actual, expected = actual[..., :width], expected[..., :width]
        actual = actual.masked_fill(is_hidden(actual), 0)
        expected = expected.masked_fill(is_hidden(expected), 0)
        return self.compare(site.name, actual, expected, factor)

    def random_vector(self, site: Site) -> Tensor:
        """Returns a random vector with the standard deviation of the values at a site."""
        size = float(self.run[site].float().std()) or 1.0
        return size * torch.randn(self.lm.shape(site), generator=torch.Generator().manual_seed(0))

    def norm_stream(self, values: Tensor, site: Site) -> Tensor:
        """Returns the values after the norm of the stream at a site, if the family has one there.

        Padding stays zero.
        """
        path = self.layout.family.stream_norms.get(site.name)
        if path is None:
            return values
        block = self.layout.family.block.format(layer=site.layer)
        with torch.no_grad():
            normed = self.lm.submodule(f"{block}{path}")(values)
        return normed.masked_fill(~self.mask[..., None].to(normed.device), 0)

    def project_to_stream(self, values: Tensor, source: Site, target: Site) -> Tensor:
        """Returns what the layer adds to the residual stream at `target` for values of `source`.

        `source` is z or mlp_post. Applies the output projection, the norm after it if there is one,
        and the multiplier.
        """
        inner, outer = self.lm.location(source).path, self.lm.location(target).path
        with torch.no_grad():
            output = forward_of_site(self.lm, source)(values)
            if not f"{inner}.".startswith(f"{outer}."):  # a norm follows the projection
                output = self.lm.submodule(outer)(output)
        return output * self.lm.layout.factor(target)

    def weigh_experts(self, path: str, neurons: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Returns what the experts module at a path gives, [token, d_model].

        `neurons` are [token, choice, neuron]; each expert's output weights are applied by hand.
        """
        module: Any = self.lm.submodule(path)
        total: Tensor | None = None
        for expert in experts.unique():
            matrix, is_chosen = module.down_proj[expert], experts == expert
            output = neurons @ (matrix if module.is_transposed else matrix.T)
            if module.has_bias:
                output = output + module.down_proj_bias[expert]
            part = (output * (weights * is_chosen)[..., None]).sum(1)
            total = part if total is None else total + part
        assert total is not None
        return total


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest expected value.

    It is nan if the shapes differ.
    """
    actual, expected = actual.double(), expected.double()
    if torch.equal(actual, expected):
        return 0.0
    if actual.shape != expected.shape:
        return math.nan
    size = max(float(expected.abs().max()), 1e-3)
    return float((actual - expected).abs().max()) / size


def default_prompts(lm: LM) -> list[Any]:
    """Returns three prompts of token ids that are spread over the vocabulary, always the same.

    For an encoder-decoder they are the sources, and the decoder has read four tokens of each.
    """
    if not lm.n_tokens:
        raise BadPrompt(f"the vocabulary of {lm!r} is not known: give prompts, rows of token ids")
    prompts = _spread_ids(lm)
    if lm.two_texts and lm.family.stacks:
        return [_with_decoder_ids(lm, source) for source in prompts]
    if placeholder_ids(lm) and "token_type_ids" in lm.takes:
        return list(map(_with_token_types, prompts))
    return prompts


def _spread_ids(lm: LM) -> list[Any]:
    """Returns the token ids of the default prompts, without special tokens."""
    numbers = iter(range(3, 3 + sum(PROMPT_LENGTHS)))
    prompts = []
    for length in PROMPT_LENGTHS:
        ids = [number**3 * 7919 % lm.n_tokens for number in islice(numbers, length)]
        prompts.append([_as_text(lm, token_id) for token_id in ids])
    return prompts


def _with_token_types(ids: list[int]) -> dict[str, Tensor]:
    """Returns a prompt of a model that reads images, with the types that its processor gives."""
    row = torch.tensor([ids])
    return {"input_ids": row, "token_type_ids": torch.zeros_like(row)}


def _with_decoder_ids(lm: LM, source: list[int]) -> dict[str, Tensor]:
    """Returns a prompt of an encoder-decoder with four tokens that its decoder has read."""
    inputs = {"input_ids": torch.tensor([source])}
    if "input_features" in lm.takes:
        generator = torch.Generator().manual_seed(len(source))
        shape = 1, lm.config.num_mel_bins, 2 * lm.config.max_source_positions
        inputs = {"input_features": torch.randn(shape, generator=generator)}
    written = [start_token(lm), *(number + 1 for number in source)] * 4
    return {**inputs, "decoder_input_ids": torch.tensor([written[:4]]) % (lm.n_tokens or 1)}


def _as_text(lm: LM, token_id: int) -> int:
    """Returns a token's id, or the next one that stands for no image and is no padding.

    RoBERTa counts no position for a token with the id of the padding.
    """
    others = placeholder_ids(lm)
    if lm.is_masked:
        others.add(getattr(lm.config, "pad_token_id", None) or 0)
    while token_id in others:
        token_id += 1
    return token_id


def last_layer_read(layout: Layout) -> int:
    """Returns the last layer of a stack that the model's output depends on.

    A tower's last blocks may run although the text model reads the stream before them.
    """
    tower = layout.family.tower
    return layout.n_layers + (-1 if tower is None else tower.last_block)


def representative_layers(layout: Layout) -> list[int]:
    """Returns the first, middle and last layer of each kind.

    Layers of one kind have the same sites.
    """
    layers_of_kind: dict[tuple[str, ...], list[int]] = {}
    names = [name for name in layout.names if name not in SITES_WITHOUT_LAYER]
    for layer in range(last_layer_read(layout) + 1):
        kind = tuple(name for name in names if layout.find(name, layer))
        layers_of_kind.setdefault(kind, []).append(layer)
    selected: set[int] = set()
    for layers in layers_of_kind.values():
        selected.update((layers[0], layers[len(layers) // 2], layers[-1]))
    return sorted(selected)


@dataclass(frozen=True)
class Finding:
    """The result of a law at one site: the relative difference and its limit."""

    site: str
    difference: float
    limit: float
    note: str = ""
    at_least: bool = False  # True: the difference has to be larger than the limit

    @property
    def holds(self) -> bool:
        """True if the law holds; False for a difference that is not a number."""
        if self.at_least:
            return self.difference > self.limit
        return self.difference <= self.limit


@dataclass(frozen=True)
class Law:
    """A law: its name, the function that checks it, and every site that it may report.

    A `causal` law is about models that write a text from left to right, and not about masked ones.
    A law `of_text` is about the whole model, and not checked again for its other stacks.
    """

    name: str
    check: Callable[[Study], Iterator[Finding]]
    sites: tuple[str, ...]
    causal: bool = False
    of_text: bool = False
