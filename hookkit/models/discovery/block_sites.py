"""Finds what a block adds to the residual stream, and the sites of its MLP, by value.

Attention's term A and the MLP's term M are the module outputs for which resid_pre + A + M is
resid_post, or whose sums with the stream are what two norms of the stream read. The MLP's last
matrix reads its neurons, and its activation what they were before.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from torch import Tensor

from ..experts import NEURONS, has_neurons
from ..families.schema import EXPERT_NEURONS, NO_ROUTER, PARALLEL_BLOCK, ModuleLocation
from .attention_sites import UNPROVED, Attention, FoundSites
from .dry_run import (
    ROWS,
    WIDTH,
    ModuleCall,
    equal_values,
    is_sum,
    sum_error,
    tolerance,
)

Inputs: TypeAlias = list[tuple[ModuleCall, Tensor]]
"""The inputs [batch, pos, d_model] of the modules of a block."""

SUM = "the block adds more to the stream than what attention and the MLP give, or multiplies it"
NEURON_CUTS = {1: "", 2: "d_mlp | d_mlp"}  # by the number of parts of an output


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
        return any(call.is_within(owner) for call in self.calls)

    def calls_at_depth(self, depth: int) -> set[ModuleCall]:
        """Returns the calls with so many enclosing calls in which, or by which, it was returned."""
        return {(*call.enclosing, call)[depth] for call in self.calls}


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
    stream_norms: dict[str, str] = field(default_factory=dict)
    attention_term: Term | None = None
    mlp_term: Term | None = None

    @property
    def attention_call(self) -> ModuleCall | None:
        return self.attention.call if self.attention else None

    @property
    def attention_end(self) -> int:
        """When attention ended, or 0 if there is none."""
        return self.attention.call.end if self.attention else 0

    @property
    def mlp_begin(self) -> int:
        """The time after which the MLP runs: attention and its part of the stream are done."""
        if self.attention_term is None:
            return self.attention_end
        return max(self.attention_end, self.attention_term.calls[-1].end)

    def stream_tensors(
        self, side: Literal["input", "output"]
    ) -> Iterator[tuple[ModuleCall, Tensor]]:
        """Yields the inputs or outputs of inner modules that have the shape of the stream."""
        for call in self.call.inner:
            value = call.input_by_token if side == "input" else call.output_by_token
            if call.runs_once and value is not None and value.shape == self.pre.shape:
                yield call, value


# ---- what a block adds to the residual stream


def locate_residual_sites(block: Block) -> None:
    """Locates attn_out, mlp_out and resid_mid."""
    terms = _possible_terms(block)
    inputs = list(block.stream_tensors("input"))
    pair = _find_pair(block, terms)
    if pair is None and _locate_normed_stream(block, terms):
        return
    if pair is not None:
        attention_term, mlp_term = pair
        mid = [block.pre, attention_term.value]
    elif _locate_only_term(block, terms):
        return
    else:
        attention_term, mlp_term, mid = _find_separate_terms(block, terms, inputs)
    block.attention_term, block.mlp_term = attention_term, mlp_term
    _locate_term(block, "attn_out", attention_term)
    _locate_term(block, "mlp_out", mlp_term)
    _locate_resid_mid(block, inputs, mid, attention_term)


def _possible_terms(block: Block) -> list[Term]:
    """Returns what modules return, and its products with the numbers that the block has."""
    outputs = _distinct_outputs(block)
    terms = list(outputs)
    for name, number in vars(block.call.module).items():
        if isinstance(number, float) and number not in (0.0, 1.0):
            terms += [Term(output.calls, name, output.value * number) for output in outputs]
    return terms


def _distinct_outputs(block: Block) -> list[Term]:
    """Returns the outputs of modules; equal outputs of several modules are one term."""
    outputs: list[Term] = []
    for call, value in block.stream_tensors("output"):
        equal = next((output for output in outputs if equal_values(output.value, value)), None)
        if equal is None:
            outputs.append(Term([call], "", value))
        else:
            equal.calls.append(call)
    return outputs


def _find_pair(block: Block, terms: list[Term]) -> tuple[Term, Term] | None:
    """Returns the A and M for which pre + A + M is post."""

    def error(pair: tuple[Term, Term]) -> float:
        first, second = pair
        return sum_error([block.pre, first.value, second.value], block.post)

    pairs = [pair for pair in itertools.permutations(terms, 2) if _may_be_pair(block, *pair)]
    best = min(pairs, key=error, default=None)
    if best is None or error(best) > tolerance(block.post):
        return None
    return best


def _may_be_pair(block: Block, first: Term, second: Term) -> bool:
    """True if the first may be attention's term and the second the MLP's."""
    if second.calls is first.calls or second.is_from(block.attention_call):
        return False
    if second.start < first.start and not first.is_from(block.attention_call):
        return False
    if block.attention is not None:
        return _may_be_attention_term(block, first)
    # Two terms of one submodule, such as a mixture of experts, are no pair.
    depth = len(block.call.enclosing) + 1
    return first.calls_at_depth(depth).isdisjoint(second.calls_at_depth(depth))


def _may_be_attention_term(block: Block, term: Term) -> bool:
    """True if attention returns it, or it comes after attention."""
    return term.is_from(block.attention_call) or term.start > block.attention_end


def _locate_normed_stream(block: Block, terms: list[Term]) -> bool:
    """True if two norms of the stream read its sums with A and with M, and the last is resid_post.

    It locates attn_out, mlp_out and resid_mid, which is the output of the first norm.
    """
    if block.attention is None:
        return False
    last_norms = [call for call in _stream_norms(block) if equal_values(call.output, block.post)]
    for first, last in itertools.product(_stream_norms(block), last_norms):
        middle = first.output_by_token
        if middle is None or first.start >= last.start:
            continue
        attention_term = _find_addend(block, terms, block.pre, first)
        mlp_term = _find_addend(block, terms, middle, last)
        if attention_term is None or mlp_term is None:
            continue
        block.attention_term, block.mlp_term = attention_term, mlp_term
        _locate_term(block, "attn_out", attention_term)
        _locate_term(block, "mlp_out", mlp_term)
        block.sites["resid_mid"] = first.location()
        for site, norm in (("resid_mid", first), ("resid_post", last)):
            block.stream_norms[site] = norm.path.removeprefix(block.call.path)
        return True
    return False


def _stream_norms(block: Block) -> list[ModuleCall]:
    """Returns the calls after attention that map a sum to something of the stream's shape."""
    calls = dict(block.stream_tensors("output"))
    return [call for call in calls if call.start > block.attention_end and not call.has_matrix]


def _find_addend(block: Block, terms: list[Term], stream: Tensor, norm: ModuleCall) -> Term | None:
    """Returns the term after attention whose sum with the stream a norm reads."""
    for term in terms:
        if term.start >= norm.start or not _may_be_attention_term(block, term):
            continue
        if norm.input_by_token is not None and is_sum([stream, term.value], norm.input_by_token):
            return term
    return None


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


def _find_separate_terms(
    block: Block, terms: list[Term], inputs: Inputs
) -> tuple[Term | None, Term | None, list[Tensor]]:
    """Returns A and M of a block that adds more than their sum, and the tensors that sum to mid."""
    later_terms = [
        term
        for term in terms
        if term.start >= block.attention_end and not term.is_from(block.attention_call)
    ]
    attention_term = _find_attention_term(block, terms, inputs)
    if attention_term is None:
        return None, *_find_mlp_term_alone(block, later_terms, inputs)
    mid = [block.pre, attention_term.value]
    for term in later_terms:
        parts = [*mid, term.value]
        if _first_reader(inputs, parts, term.start) or is_sum(parts, block.post):
            block.exceptions["sum"] = SUM
            return attention_term, term, mid
    return attention_term, None, mid


def _find_attention_term(block: Block, terms: list[Term], inputs: Inputs) -> Term | None:
    """Returns A if a later module reads pre + A."""
    for term in terms:
        after, parts = max(term.start, block.attention_end), [block.pre, term.value]
        if _may_be_attention_term(block, term) and _first_reader(inputs, parts, after):
            return term
    return None


def _find_mlp_term_alone(
    block: Block, terms: list[Term], inputs: Inputs
) -> tuple[Term | None, list[Tensor]]:
    """Returns M and mid if what a module after attention reads is mid, and mid + M is post."""
    if block.attention is None:
        return None, []
    for (call, mid), term in itertools.product(inputs, terms):
        if call.start > block.attention_end and is_sum([mid, term.value], block.post):
            return term, [mid]
    return None, []


def _first_reader(inputs: Inputs, parts: list[Tensor], after: int) -> ModuleCall | None:
    """Returns the first call after a time whose input is the sum of these parts."""
    for call, value in inputs:
        if call.start > after and is_sum(parts, value):
            return call
    return None


def _locate_term(block: Block, name: str, term: Term | None) -> None:
    if term is None:
        part = {"attn_out": "attention", "mlp_out": "the MLP"}[name]
        block.sites[name] = (
            f"{UNPROVED}no module's output, as {part}'s part of what the block adds, gives "
            "resid_post"
        )
        return
    call = _main_call(block, term)
    block.sites[name] = call.location(times=term.multiplier)
    # A module that replaces attention: a convolution, or linear attention.
    if name == "attn_out" and block.attention is None and _reads_input(call.linear_calls, call):
        block.sites["attn_in"] = call.location("input")


def _reads_input(calls: list[ModuleCall], owner: ModuleCall) -> bool:
    """True if a matrix in one of the calls has the same input as their owner."""
    return any(call.has_matrix and equal_values(call.input, owner.input) for call in calls)


def _main_call(block: Block, term: Term) -> ModuleCall:
    """Returns attention's call, or the first call that contains others, or the last one."""
    attention_call = block.attention_call
    if attention_call is not None and attention_call in term.calls:
        return attention_call
    for call in term.calls:
        if call.inner and not call.is_within(attention_call):
            return call
    return term.calls[-1]


def _locate_resid_mid(
    block: Block, inputs: Inputs, mid: list[Tensor], attention_term: Term | None
) -> None:
    """Locates resid_mid at the first module that reads the sum of the tensors `mid`."""
    if not mid:
        block.sites["resid_mid"] = UNPROVED + (
            "it is the sum of resid_pre and attn_out, and not both of attn_out and mlp_out were "
            "found"
        )
        return
    after = block.attention_end
    if attention_term is not None:
        after = max(after, attention_term.start)
    reader = _first_reader(inputs, mid, after)
    if reader is None:
        block.sites |= PARALLEL_BLOCK
    else:
        block.sites["resid_mid"] = reader.location("input", shared=True)


# ---- the MLP


def locate_mlp_sites(block: Block) -> None:
    """Locates mlp_in, mlp_pre, mlp_post and the sites of a router."""
    module = _find_mlp_module(block)
    mlp = module or replace(block.call, inner=_calls_without_mlp_module(block))
    block.sites |= _locate_router(mlp.inner)
    entry = module or next(iter(mlp.linear_calls), None)
    if not mlp.inner or entry is None:
        reason = UNPROVED + "no MLP was seen in this block"
        block.sites |= dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post"), reason)
        return
    block.sites["mlp_in"] = _locate_mlp_in(block, mlp, entry)
    block.sites |= _locate_neurons(block, mlp)


def _find_mlp_module(block: Block) -> ModuleCall | None:
    """Returns the module that contains the MLP's matrices, or None if the block itself does."""
    candidates = [call for call in block.call.inner if _may_be_mlp(block, call)]
    if block.mlp_term is not None:
        return _mlp_of_term(block, block.mlp_term, candidates)
    later = [call for call in candidates if call.start > block.attention_end]
    return later[0] if block.attention is not None and len(later) == 1 else None


def _may_be_mlp(block: Block, call: ModuleCall) -> bool:
    """True for a direct submodule of the block, other than attention, that contains matrices."""
    if call.parent is not block.call or not call.runs_once or call.is_linear:
        return False
    has_attention = block.attention is not None and block.attention.call.is_within(call)
    return call.has_matrix and not has_attention


def _mlp_of_term(block: Block, term: Term, candidates: list[ModuleCall]) -> ModuleCall | None:
    """Returns the last module that gives the MLP's term or runs between attention and its end."""
    if any(call.is_linear and call.parent is block.call for call in term.calls):
        return None
    for call in reversed(candidates):
        if term.is_from(call) or _runs_between(block, call, term):
            return call if _may_read_stream(block, call) else None
    return None


def _may_read_stream(block: Block, call: ModuleCall) -> bool:
    """False if what a module reads is wider or narrower than the stream."""
    value = call.input_by_token
    return value is None or value.shape[-1] == block.pre.shape[-1]


def _runs_between(block: Block, call: ModuleCall, term: Term) -> bool:
    """True if a call starts after attention and does not end after the term."""
    return block.mlp_begin < call.start < call.end <= term.calls[-1].end


def _calls_without_mlp_module(block: Block) -> list[ModuleCall]:
    """Returns the calls of an MLP that is no module: those in the block after attention."""
    term = block.mlp_term
    if term is None or block.attention is None:
        return []
    calls = [call for call in block.call.inner if _runs_between(block, call, term)]
    return [call for call in calls if call.runs_once]


def _locate_mlp_in(block: Block, mlp: ModuleCall, entry: ModuleCall) -> ModuleLocation | str:
    """Locates mlp_in at the input of the MLP's module or first matrix, if a matrix reads it."""
    value = entry.input_by_token
    is_like_stream = value is not None and value.shape[-1] == block.pre.shape[-1]
    if is_like_stream and _reads_input(mlp.inner, entry):
        return entry.location("input")
    return UNPROVED + "no matrix of the MLP reads what its module is given"


def _locate_neurons(block: Block, mlp: ModuleCall) -> FoundSites:
    """Locates mlp_pre and mlp_post."""
    linear_calls = mlp.linear_calls
    if linear_calls and _gives_mlp_output(block, mlp, linear_calls[-1]):
        return {
            "mlp_pre": _locate_mlp_pre(linear_calls, _activation_inputs(mlp)),
            "mlp_post": linear_calls[-1].location("input"),
        }
    modules = dict(mlp.module.named_modules())
    mixtures = [path for path, module in modules.items() if has_neurons(module)]
    if len(mixtures) == 1:
        path = f"{mlp.path}.{mixtures[0]}".removesuffix(".")
        return {name: ModuleLocation(path, "inside", name, flat=True) for name in NEURONS}
    if "expert" in " ".join(modules):
        return {**EXPERT_NEURONS}
    reason = UNPROVED + "the MLP's last matrix, if it has one, does not give what the MLP gives"
    return dict.fromkeys(EXPERT_NEURONS, reason)


def _gives_mlp_output(block: Block, mlp: ModuleCall, last: ModuleCall) -> bool:
    """True if the last matrix returns the MLP's output, and so reads all neurons of a token."""
    if not last.runs_once or last.input_by_token is None:
        return False
    if block.mlp_term is not None and last in block.mlp_term.calls:
        return True
    return mlp.module is not block.call.module and equal_values(last.output, mlp.output)


def _locate_mlp_pre(
    linear_calls: list[ModuleCall], activation_inputs: list[Tensor | None]
) -> ModuleLocation | str:
    """Locates mlp_pre at the matrix whose output, or half of it, an activation reads."""
    *earlier, last = linear_calls
    assert last.input is not None
    for call in earlier:
        parts = _parts_of_width(call, last.input.shape[-1])
        for number, part in enumerate(parts):
            if any(equal_values(part, value) for value in activation_inputs):
                return call.location(cut=NEURON_CUTS[len(parts)], part=number)
    return UNPROVED + "no matrix's output is what the MLP's activation reads"


def _parts_of_width(call: ModuleCall, width: int) -> tuple[Tensor, ...]:
    """Returns the output, or its two halves, if they have this width."""
    output = call.output_by_token
    if output is None or not call.runs_once or output.shape[-1] not in (width, 2 * width):
        return ()
    return output.split(width, dim=-1)


def _activation_inputs(mlp: ModuleCall) -> list[Tensor | None]:
    """Returns the inputs of activation functions, and of modules that may be activations."""
    inputs = [call.input for call in filter(_may_be_activation, mlp.inner)]
    for function_call in mlp.function_calls:
        if function_call.kind == "activation":
            inputs += function_call.inputs[:1]
    return inputs


def _may_be_activation(call: ModuleCall) -> bool:
    """True for a module without submodules that is no matrix and no norm, and changes its input."""
    is_norm = "norm" in type(call.module).__name__.lower()
    if is_norm or call.is_linear or list(call.module.children()):
        return False
    return not equal_values(call.input, call.output)


def _locate_router(calls: list[ModuleCall]) -> FoundSites:
    """Locates the sites of a module that rates the experts for each token."""
    router = next(filter(_is_router, calls), None)
    if router is None:
        return dict.fromkeys(NO_ROUTER, "no router was seen in this block's MLP")
    path = router.path
    sites: FoundSites = {"router_logits": ModuleLocation(path, "inside", "router", flat=True)}
    if _gives_choices(router):
        sites["expert_weights"] = ModuleLocation(path, item=1, flat=True)
        sites["experts"] = ModuleLocation(path, item=2, flat=True)
    else:
        reason = f"the router {router.name!r} does not give logits, weights and indices"
        sites |= dict.fromkeys(("expert_weights", "experts"), UNPROVED + reason)
    return sites


def _is_router(call: ModuleCall) -> bool:
    """True if one of several outputs is like that of the first linear map, [tokens, expert]."""
    logits = next(
        (linear.output for linear in call.function_calls if linear.kind == "linear"), None
    )
    if logits is None or not call.runs_once or len(call.outputs) < 2:
        return False
    shapes = [getattr(output, "shape", None) for output in call.outputs]
    is_by_token = logits.shape[:-1] == (ROWS * WIDTH,)
    return is_by_token and logits.shape in shapes and None not in shapes


def _gives_choices(router: ModuleCall) -> bool:
    """True if a weight and the index of an expert for each token and choice follow the logits."""
    if len(router.outputs) != 3:
        return False
    _, weights, experts = router.outputs
    if experts.is_floating_point() or not weights.is_floating_point():
        return False
    return weights.shape == experts.shape == (ROWS * WIDTH, experts.shape[-1])
