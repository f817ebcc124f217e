"""Finds the sites of the MLP by value: its last projection, its activation and its router."""

from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import EXPERT_NEURONS, NO_ROUTER
from .attention_sites import UNPROVED, FoundSites
from .dry_run import ROWS, WIDTH, FunctionCall, ModuleCall
from .matching import equal_values
from .residual_sites import Block


def locate_mlp_sites(block: Block) -> None:
    """Locates mlp_in, mlp_pre, mlp_post and the sites of a router."""
    mlp = _find_mlp(block)
    calls = _calls_without_mlp(block) if mlp is None else mlp.inner
    linear_calls = [call for call in calls if call.is_linear]
    block.sites |= _locate_router(calls)
    if calls and (mlp or linear_calls):
        block.sites["mlp_in"] = _locate_mlp_in(block, mlp or linear_calls[0], calls)
        block.sites |= _locate_neurons(block, mlp, calls)
    else:
        reason = UNPROVED + "no MLP was seen in this block"
        block.sites |= dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post"), reason)


def _find_mlp(block: Block) -> ModuleCall | None:
    """Returns the module that contains the MLP's matrices, or None if the block itself does."""
    term, candidates = block.mlp_term, _mlp_candidates(block)
    later = [call for call in candidates if call.start > block.attention_end]
    if term is None:
        return later[0] if block.attention is not None and len(later) == 1 else None
    if any(call.is_linear and call.enclosing[-1] is block.call for call in term.calls):
        return None
    for call in reversed(candidates):
        if term.is_from(call) or (call in later and call.end <= term.calls[-1].end):
            return call
    return None


def _mlp_candidates(block: Block) -> list[ModuleCall]:
    """Returns the direct submodules of the block, other than attention, that contain matrices."""
    candidates = []
    for call in block.call.inner:
        is_direct = call.enclosing[-1] is block.call and call.runs_once
        if is_direct and not call.is_linear and _has_matrix(call):
            candidates.append(call)
    if block.attention is not None:
        return [call for call in candidates if not block.attention.call.is_within(call)]
    return candidates


def _has_matrix(call: ModuleCall) -> bool:
    return any(weight.ndim > 1 for weight in call.module.parameters())


def _calls_without_mlp(block: Block) -> list[ModuleCall]:
    """Returns the calls of an MLP that is no module: those in the block after attention."""
    if block.mlp_term is None or block.attention is None:
        return []
    end = block.mlp_term.calls[-1].end
    calls = []
    for call in block.call.inner:
        if call.start > block.attention_end and call.end <= end and call.runs_once:
            calls.append(call)
    return calls


def _locate_mlp_in(
    block: Block, entry: ModuleCall, calls: list[ModuleCall]
) -> ModuleLocation | str:
    """Locates mlp_in at the input of the MLP's module or first matrix, if a matrix reads it."""
    value = entry.input_by_token
    if value is not None and value.shape[-1] == block.pre.shape[-1]:
        for call in calls:
            has_matrix = call.is_linear or _has_matrix(call)
            if has_matrix and equal_values(call.input, value):
                return entry.location("input")
    return UNPROVED + "no matrix of the MLP reads what its module is given"


def _locate_neurons(block: Block, mlp: ModuleCall | None, calls: list[ModuleCall]) -> FoundSites:
    """Locates mlp_pre and mlp_post."""
    owner = mlp or block.call
    linear_calls = [call for call in calls if call.is_linear]
    if linear_calls and _gives_mlp_output(block, mlp, linear_calls[-1]):
        mlp_pre = _locate_mlp_pre(calls, linear_calls[-1], owner.function_calls)
        return {"mlp_pre": mlp_pre, "mlp_post": linear_calls[-1].location("input")}
    if any("expert" in name for name, _ in owner.module.named_modules()):
        return {**EXPERT_NEURONS}
    reason = UNPROVED + "the MLP's last matrix, if it has one, does not give what the MLP gives"
    return dict.fromkeys(EXPERT_NEURONS, reason)


def _gives_mlp_output(block: Block, mlp: ModuleCall | None, last: ModuleCall) -> bool:
    """True if the last matrix returns the MLP's output, and so reads all neurons of a token."""
    if not last.runs_once or last.input_by_token is None:
        return False
    if block.mlp_term is not None and last in block.mlp_term.calls:
        return True
    return mlp is not None and equal_values(last.output, mlp.output)


def _locate_mlp_pre(
    calls: list[ModuleCall], last: ModuleCall, function_calls: list[FunctionCall]
) -> ModuleLocation | str:
    """Locates mlp_pre at the matrix whose output, or half of it, an activation reads."""
    activation_inputs = _activation_inputs(calls, function_calls)
    assert last.input is not None
    d_mlp = last.input.shape[-1]
    for call in calls:
        output = call.output_by_token
        if not call.is_linear or call is last or not call.runs_once or output is None:
            continue
        cuts = {d_mlp: "", 2 * d_mlp: "d_mlp | d_mlp"}
        if output.shape[-1] not in cuts:
            continue
        for number, part in enumerate(output.split(d_mlp, dim=-1)):
            if any(equal_values(part, value) for value in activation_inputs):
                return call.location(cut=cuts[output.shape[-1]], part=number)
    return UNPROVED + "no matrix's output is what the MLP's activation reads"


def _activation_inputs(
    calls: list[ModuleCall], function_calls: list[FunctionCall]
) -> list[Tensor | None]:
    """Returns the inputs of activation functions, and of modules that may be activations."""
    inputs: list[Tensor | None] = []
    for function_call in function_calls:
        if function_call.kind == "activation" and function_call.inputs:
            inputs.append(function_call.inputs[0])
    for call in calls:
        is_leaf = not call.is_linear and not any(True for _ in call.module.children())
        is_norm = "norm" in type(call.module).__name__.lower()
        if is_leaf and not is_norm and not equal_values(call.input, call.output):
            inputs.append(call.input)
    return inputs


def _locate_router(calls: list[ModuleCall]) -> FoundSites:
    """Locates the sites of a module that rates the experts for each token."""
    for call in calls:
        logits = _router_logits(call)
        if logits is None:
            continue
        sites: FoundSites = {
            "router_logits": ModuleLocation(call.path, "inside", "router", flat=True)
        }
        if len(call.outputs) == 3 and _is_choice(*call.outputs):
            sites["expert_weights"] = ModuleLocation(call.path, item=1, flat=True)
            sites["experts"] = ModuleLocation(call.path, item=2, flat=True)
        else:
            reason = f"the router {call.name!r} does not give logits, weights and indices"
            sites |= dict.fromkeys(("expert_weights", "experts"), UNPROVED + reason)
        return sites
    return dict.fromkeys(NO_ROUTER, "no router was seen in this block's MLP")


def _router_logits(call: ModuleCall) -> Tensor | None:
    """Returns a router's logits [tokens, expert]: the output of the first linear map in it."""
    if len(call.outputs) < 2 or any(output is None for output in call.outputs):
        return None
    linear_outputs = [linear.output for linear in call.function_calls if linear.kind == "linear"]
    if not linear_outputs or not call.runs_once:
        return None
    logits = linear_outputs[0]
    is_output = any(output.shape == logits.shape for output in call.outputs)
    return logits if is_output and logits.ndim == 2 and len(logits) == ROWS * WIDTH else None


def _is_choice(_: Tensor, weights: Tensor, experts: Tensor) -> bool:
    """True for the outputs of a router with a weight and an expert for each token and choice."""
    if experts.is_floating_point() or not weights.is_floating_point():
        return False
    return weights.shape == experts.shape == (ROWS * WIDTH, experts.shape[-1])
