"""Finds what a block adds to the residual stream, by value.

Attention's term A and the MLP's term M are the module outputs for which resid_pre + A + M is
resid_post.
"""

import itertools
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..families.shared import PARALLEL_BLOCK
from .attention_sites import UNPROVED, Attention, FoundSites
from .dry_run import ModuleCall
from .matching import equal_values, is_sum, sum_error, tolerance

Inputs: TypeAlias = list[tuple[ModuleCall, Tensor]]
"""The inputs [batch, pos, d_model] of the modules of a block."""

SUM = "the block adds more to the stream than what attention and the MLP give, or multiplies it"


@dataclass(eq=False)
class Term:
    """What a block may add to the stream: what these calls return, perhaps times a number."""

    calls: list[ModuleCall]
    multiplier: str  # the block's attribute with that number, or ""
    value: Tensor  # [batch, pos, d_model]

    @property
    def start(self) -> int:
        """The start of the last call that returned it."""
        return self.calls[-1].start

    def is_from(self, owner: ModuleCall | None) -> bool:
        """True if this call, or a call inside it, returned it."""
        return owner is not None and any(call.is_within(owner) for call in self.calls)


@dataclass(eq=False)
class Block:
    """One block: its call, its stream, and what discovery has found in it so far.

    The steps of discovery fill the fields with defaults, one after another.
    """

    call: ModuleCall
    pre: Tensor
    post: Tensor
    attention: Attention | None = None
    sites: FoundSites = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    mlp_term: Term | None = None

    @property
    def attention_call(self) -> ModuleCall | None:
        return self.attention.call if self.attention else None

    @property
    def attention_end(self) -> int:
        """When attention ended, or 0 if there is none."""
        return self.attention.call.end if self.attention else 0


def locate_residual_sites(block: Block) -> None:
    """Locates attn_out, mlp_out and resid_mid."""
    terms = _possible_terms(block)
    inputs = _stream_inputs(block)
    pair = _find_pair(block, terms)
    if pair is not None:
        attention_term, mlp_term = pair
        mid = [block.pre, attention_term.value]
    elif _locate_only_term(block, terms):
        return
    else:
        attention_term = _find_attention_term(block, terms, inputs)
        mlp_term, mid = _find_mlp_term(block, terms, inputs, attention_term)
        if attention_term is not None and mlp_term is not None:
            block.exceptions["sum"] = SUM
    block.mlp_term = mlp_term
    _locate_term(block, "attn_out", attention_term)
    _locate_term(block, "mlp_out", mlp_term)
    if not mid:
        reason = (
            "it is the sum of resid_pre and attn_out, and not both of attn_out and mlp_out were "
            "found"
        )
        block.sites["resid_mid"] = UNPROVED + reason
        return
    after = block.attention_end
    if attention_term is not None:
        after = max(after, attention_term.start)
    reader = _first_reader(inputs, mid, after)
    if reader is None:
        block.sites |= PARALLEL_BLOCK
    else:
        block.sites["resid_mid"] = reader.location("input", shared=True)


def _possible_terms(block: Block) -> list[Term]:
    outputs: list[Term] = []
    for call in block.call.inner:
        value = call.output_by_token
        if value is None or value.shape != block.pre.shape or not call.runs_once:
            continue
        equal = [output for output in outputs if equal_values(output.value, value)]
        if equal:
            equal[0].calls.append(call)
        else:
            outputs.append(Term([call], "", value))
    terms = list(outputs)
    for name, number in vars(block.call.module).items():
        if isinstance(number, float) and number not in (0.0, 1.0):
            for output in outputs:
                terms.append(Term(output.calls, name, output.value * number))
    return terms


def _stream_inputs(block: Block) -> Inputs:
    inputs = []
    for call in block.call.inner:
        value = call.input_by_token
        if value is not None and value.shape == block.pre.shape and call.runs_once:
            inputs.append((call, value))
    return inputs


def _find_pair(block: Block, terms: list[Term]) -> tuple[Term, Term] | None:
    """Returns the A and M for which pre + A + M is post."""
    best, smallest_error = None, float("inf")
    for first, second in itertools.product(terms, terms):
        if _may_be_pair(block, first, second):
            error = sum_error([block.pre, first.value, second.value], block.post)
            if error < smallest_error:
                best, smallest_error = (first, second), error
    return best if smallest_error <= tolerance(block.post) else None


def _may_be_attention_term(block: Block, term: Term) -> bool:
    """True if attention returns it, or it comes after attention."""
    return term.is_from(block.attention_call) or term.start > block.attention_end


def _may_be_pair(block: Block, first: Term, second: Term) -> bool:
    """True if the first may be attention's term and the second the MLP's."""
    if second.calls is first.calls or second.is_from(block.attention_call):
        return False
    if second.start < first.start and not first.is_from(block.attention_call):
        return False
    if block.attention is None:
        return not _share_submodule(block, first, second)
    return _may_be_attention_term(block, first)


def _share_submodule(block: Block, first: Term, second: Term) -> bool:
    """True if both come from one submodule of the block, such as a mixture of experts."""
    depth = len(block.call.enclosing) + 1
    first_submodules = {(*call.enclosing, call)[depth] for call in first.calls}
    second_submodules = {(*call.enclosing, call)[depth] for call in second.calls}
    return bool(first_submodules & second_submodules)


def _locate_only_term(block: Block, terms: list[Term]) -> bool:
    """True if the block adds a single term, which is attn_out if it is attention's."""
    for term in terms:
        if not is_sum([block.pre, term.value], block.post):
            continue
        if term.is_from(block.attention_call):
            reason = "the block has no MLP: it adds what attention gives, and nothing more"
            _locate_term(block, "attn_out", term)
        else:
            name = _main_call(block, term).name
            reason = (
                f"the block adds one thing, what its module {name!r} gives: reach it with hk.module"
            )
            block.sites["attn_out"] = reason
        block.sites |= dict.fromkeys(("mlp_out", "resid_mid"), reason)
        return True
    return False


def _find_attention_term(block: Block, terms: list[Term], inputs: Inputs) -> Term | None:
    """Returns A if a later module reads pre + A."""
    for term in terms:
        after, parts = max(term.start, block.attention_end), [block.pre, term.value]
        if _may_be_attention_term(block, term) and _first_reader(inputs, parts, after):
            return term
    return None


def _find_mlp_term(
    block: Block, terms: list[Term], inputs: Inputs, attention_term: Term | None
) -> tuple[Term | None, list[Tensor]]:
    """Returns M if mid + M is post or read later, and the tensors that add up to mid.

    Without A, mid may be what any module after attention reads, and mid + M must be post.
    """
    bases: list[list[Tensor]] = []
    if attention_term is not None:
        bases.append([block.pre, attention_term.value])
    elif block.attention is not None:
        bases = [[value] for call, value in inputs if call.start > block.attention_end]
    for base, term in itertools.product(bases, terms):
        if term.is_from(block.attention_call) or term.start < block.attention_end:
            continue
        parts = [*base, term.value]
        is_read = attention_term is not None and _first_reader(inputs, parts, term.start)
        if is_read or is_sum(parts, block.post):
            return term, base
    return None, bases[0] if attention_term is not None else []


def _first_reader(inputs: Inputs, parts: list[Tensor], after: int) -> ModuleCall | None:
    """Returns the first call after a time whose input is the sum of these parts."""
    for call, value in inputs:
        if call.start > after and is_sum(parts, value):
            return call
    return None


def _main_call(block: Block, term: Term) -> ModuleCall:
    """Returns attention's call, or the first call that contains others, or the last one."""
    attention_call = block.attention_call
    if attention_call is not None and attention_call in term.calls:
        return attention_call
    for call in term.calls:
        if call.inner and (attention_call is None or not call.is_within(attention_call)):
            return call
    return term.calls[-1]


def _locate_term(block: Block, name: str, term: Term | None) -> None:
    if term is None:
        part = "attention" if name == "attn_out" else "the MLP"
        block.sites[name] = (
            f"{UNPROVED}no module's output, as {part}'s part of what the block adds, gives "
            "resid_post"
        )
        return
    call = _main_call(block, term)
    block.sites[name] = call.location(times=term.multiplier)
    reads = any(inner.is_linear and equal_values(inner.input, call.input) for inner in call.inner)
    # A module that replaces attention: a convolution, or linear attention.
    if reads and name == "attn_out" and block.attention is None:
        block.sites["attn_in"] = call.location("input")
