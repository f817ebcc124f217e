"""Finds what a block adds to the residual stream, by value.

Attention's term A and the MLP's term M are the module outputs for which resid_pre + A + M is
resid_post.
"""

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import PARALLEL_BLOCK
from .attention_sites import UNPROVED, Attention
from .dry_run import ModuleCall, Recording
from .matching import equal_values, is_flat, is_sum, sum_error, tolerance

SUM = "the block adds more to the stream than what attention and the MLP give, or multiplies it"


@dataclass(eq=False)
class Output:
    """A tensor [batch, pos, d_model] that modules of a block return, and their calls."""

    value: Tensor
    calls: list[ModuleCall]

    @property
    def start(self) -> int:
        """The start of the last call that returned it."""
        return self.calls[-1].start

    def is_from(self, owner: ModuleCall | None) -> bool:
        """True if this call, or a call inside it, returned it."""
        if owner is None:
            return False
        return any(call is owner or owner in call.enclosing for call in self.calls)


@dataclass(eq=False)
class Term:
    """What a block may add to the stream: an output, perhaps times a number that the block has."""

    output: Output
    multiplier: str  # the block's attribute with that number, or ""
    value: Tensor


@dataclass(eq=False)
class Block:
    """One block: its call, its stream, and what discovery has found in it so far.

    The steps of discovery fill the fields with defaults, one after another.
    """

    recording: Recording
    call: ModuleCall
    attention: Attention | None
    pre: Tensor
    post: Tensor
    locations: dict[str, ModuleLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    mlp_term: Term | None = None

    @property
    def attention_call(self) -> ModuleCall | None:
        return self.attention.call if self.attention else None

    @property
    def attention_end(self) -> int:
        """When attention ended, or 0 if there is none."""
        return self.attention.call.end if self.attention else 0

    def is_in_attention(self, call: ModuleCall) -> bool:
        """True for attention's call and for the calls inside it."""
        attention_call = self.attention_call
        return attention_call is not None and (
            call is attention_call or attention_call in call.enclosing
        )


def locate_residual_sites(block: Block) -> None:
    """Locates attn_out, mlp_out and resid_mid."""
    terms = _possible_terms(block)
    attention_term, mlp_term = _find_both_terms(block, terms)
    mid = None
    if attention_term is None and mlp_term is None:
        attention_term, mid = _find_attention_term(block, terms)
        mlp_term, base = _find_mlp_term(block, terms, mid)
        if mid is None:
            mid = base
        if attention_term is not None and mlp_term is not None:
            block.exceptions["sum"] = SUM
    elif attention_term is not None and mlp_term is not None:
        mid = block.pre + attention_term.value
    _locate_term(block, "attn_out", attention_term)
    _locate_term(block, "mlp_out", mlp_term)
    block.mlp_term = mlp_term
    _locate_resid_mid(block, attention_term, mid)


def _possible_terms(block: Block) -> list[Term]:
    outputs: list[Output] = []
    for call in block.recording.calls_within(block.call):
        value = block.recording.by_token(call.output)
        if value is None or value.shape != block.pre.shape or not block.recording.runs_once(call):
            continue
        for output in outputs:
            if equal_values(output.value, value):
                output.calls.append(call)
                break
        else:
            outputs.append(Output(value, [call]))
    multipliers = _multipliers(block)
    terms = []
    for output in outputs:
        for name, factor in multipliers.items():
            terms.append(Term(output, name, output.value * factor))
    return terms


def _multipliers(block: Block) -> dict[str, float]:
    numbers = {"": 1.0}
    for name, value in vars(block.call.module).items():
        if isinstance(value, float) and value not in (0.0, 1.0):
            numbers[name] = value
    return numbers


def _may_be_attention_term(block: Block, term: Term) -> bool:
    """True if attention returns it, or it comes after attention."""
    output = term.output
    attention_call = block.attention_call
    if attention_call is None or output.is_from(attention_call):
        return True
    return output.start > attention_call.end


def _find_both_terms(block: Block, terms: list[Term]) -> tuple[Term | None, Term | None]:
    """Returns the A and M for which pre + A + M is post, or A alone if the block adds one thing."""
    smallest_error = float("inf")
    best: tuple[Term, Term] | None = None
    for first, second in itertools.product(terms, terms):
        if not _may_be_pair(block, first, second):
            continue
        error = sum_error([block.pre, first.value, second.value], block.post)
        if error < smallest_error:
            smallest_error, best = error, (first, second)
    if best is not None and smallest_error <= tolerance(block.post):
        return best
    return _find_only_term(block, terms), None


def _may_be_pair(block: Block, first: Term, second: Term) -> bool:
    """True if the first may be attention's term and the second the MLP's."""
    attention_call = block.attention_call
    if second.output is first.output or second.output.is_from(attention_call):
        return False
    if not _may_be_attention_term(block, first):
        return False
    is_earlier = second.output.start < first.output.start
    if is_earlier and not first.output.is_from(attention_call):
        return False
    if _encloses(first, second) or _encloses(second, first):
        return False
    return attention_call is not None or not _share_submodule(block, first, second)


def _encloses(outer: Term, inner: Term) -> bool:
    """True if each call of `outer` contains a call of `inner`."""
    for outer_call in outer.output.calls:
        if not any(outer_call in inner_call.enclosing for inner_call in inner.output.calls):
            return False
    return True


def _share_submodule(block: Block, first: Term, second: Term) -> bool:
    """True if both come from one submodule of the block, such as a mixture of experts."""
    depth = len(block.call.enclosing) + 1
    first_submodules = {(*call.enclosing, call)[depth] for call in first.output.calls}
    second_submodules = {(*call.enclosing, call)[depth] for call in second.output.calls}
    return bool(first_submodules & second_submodules)


def _find_only_term(block: Block, terms: list[Term]) -> Term | None:
    """Returns A if pre + A is post and A is attention's. Notes why other sites are missing."""
    for term in terms:
        if is_sum([block.pre, term.value], block.post):
            break
    else:
        return None
    if term.output.is_from(block.attention_call):
        reason = "the block has no MLP: it adds what attention gives, and nothing more"
        block.missing |= dict.fromkeys(("mlp_out", "resid_mid"), reason)
        return term
    name = _main_call(block, term.output).name
    reason = f"the block adds one thing, what its module {name!r} gives: reach it with hk.module"
    block.missing |= dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), reason)
    return None


def _stream_inputs(block: Block) -> list[tuple[ModuleCall, Tensor]]:
    """Returns the inputs [batch, pos, d_model] of the modules outside attention."""
    inputs = []
    for call in block.recording.calls_within(block.call):
        value = block.recording.by_token(call.input)
        if value is None or value.shape != block.pre.shape or block.is_in_attention(call):
            continue
        inputs.append((call, value))
    return inputs


def _find_attention_term(block: Block, terms: list[Term]) -> tuple[Term | None, Tensor | None]:
    """Returns A and pre + A if a later module reads that sum."""
    inputs = _stream_inputs(block)
    for term in terms:
        if not _may_be_attention_term(block, term):
            continue
        after = max(term.output.start, block.attention_end)
        for call, value in inputs:
            if call.start > after and is_sum([block.pre, term.value], value):
                return term, block.pre + term.value
    return None, None


def _find_mlp_term(
    block: Block, terms: list[Term], mid: Tensor | None
) -> tuple[Term | None, Tensor | None]:
    """Returns M and mid if mid + M is post, or if `mid` is known and a later module reads mid + M.

    An unknown `mid` may be what any module after attention reads.
    """
    inputs = _stream_inputs(block)
    bases: list[Tensor] = []
    if mid is not None:
        bases.append(mid)
    elif block.attention_end:
        bases = [value for call, value in inputs if call.start > block.attention_end]
    for base in bases:
        if equal_values(base, block.pre):
            continue
        for term in terms:
            output = term.output
            if output.is_from(block.attention_call) or output.start < block.attention_end:
                continue
            totals = [block.post]
            if mid is not None:
                totals += [value for call, value in inputs if call.start > output.start]
            if any(is_sum([base, term.value], total) for total in totals):
                return term, base
    return None, None


def _main_call(block: Block, output: Output) -> ModuleCall:
    """Returns attention's call, or the first call that contains others, or the last one."""
    attention_call = block.attention_call
    if attention_call is not None and attention_call in output.calls:
        return attention_call
    for call in output.calls:
        if block.recording.calls_within(call) and not block.is_in_attention(call):
            return call
    return output.calls[-1]


def _locate_term(block: Block, name: str, term: Term | None) -> None:
    if term is None:
        part = "attention" if name == "attn_out" else "the MLP"
        reason = (
            f"{UNPROVED}no module's output, as {part}'s part of what the block adds, gives "
            "resid_post"
        )
        block.missing.setdefault(name, reason)
        return
    call = _main_call(block, term.output)
    block.locations[name] = ModuleLocation(
        call.path, flat=is_flat(call.output), times=term.multiplier
    )
    if name == "attn_out" and block.attention is None:
        _locate_mixer_input(block, call)


def _locate_mixer_input(block: Block, call: ModuleCall) -> None:
    """Locates attn_in for a module that replaces attention: a convolution, or linear attention."""
    for inner in block.recording.calls_within(call):
        if inner.is_linear and equal_values(inner.input, call.input):
            block.locations["attn_in"] = ModuleLocation(
                call.path, "input", flat=is_flat(call.input)
            )
            return


def _locate_resid_mid(block: Block, attention_term: Term | None, mid: Tensor | None) -> None:
    """Locates resid_mid at the input of a module between attention and the MLP."""
    if mid is None:
        reason = (
            "it is the sum of resid_pre and attn_out, and not both of attn_out and mlp_out were "
            "found"
        )
        block.missing.setdefault("resid_mid", UNPROVED + reason)
        return
    after, terms = block.attention_end, [mid]
    if attention_term is not None:
        after = max(after, attention_term.output.start)
        terms = [block.pre, attention_term.value]
    for call, value in _stream_inputs(block):
        if call.start > after and block.recording.runs_once(call) and is_sum(terms, value):
            block.locations["resid_mid"] = ModuleLocation(
                call.path, "input", shared=True, flat=is_flat(call.input)
            )
            return
    block.missing |= PARALLEL_BLOCK
