"""Finds the sites of the MLP by value: its last projection, its activation and its router."""

from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import EXPERT_NEURONS, NO_ROUTER
from .attention_sites import UNPROVED
from .dry_run import ModuleCall
from .matching import equal_values, is_flat
from .residual_sites import Block


def locate_mlp_sites(block: Block) -> None:
    """Locates mlp_in, mlp_pre, mlp_post and the sites of a router."""
    mlp = _find_mlp(block)
    calls = _mlp_calls(block, mlp)
    linear_calls = [call for call in calls if call.is_linear]
    _locate_router(block, calls)
    if not calls or (mlp is None and not linear_calls):
        reason = UNPROVED + "no MLP was seen in this block"
        block.missing |= dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post"), reason)
        return
    _locate_mlp_in(block, mlp or linear_calls[0], calls)
    if not linear_calls or not _gives_mlp_output(block, mlp, linear_calls[-1]):
        reason = UNPROVED + "the MLP's last matrix, if it has one, does not give what the MLP gives"
        block.missing |= dict.fromkeys(EXPERT_NEURONS, reason)
        if _has_experts(mlp or block.call):
            block.missing |= EXPERT_NEURONS
        return
    last = linear_calls[-1]
    block.locations["mlp_post"] = ModuleLocation(last.path, "input", flat=is_flat(last.input))
    _locate_mlp_pre(block, calls, last)


def _has_experts(call: ModuleCall) -> bool:
    return any("expert" in name for name, _ in call.module.named_modules())


def _find_mlp(block: Block) -> ModuleCall | None:
    """Returns the module that contains the MLP's matrices, or None if the block itself does."""
    candidates = _mlp_candidates(block)
    attention_call = block.attention_call
    term = block.mlp_term
    if term is None:
        if attention_call is None:
            return None
        later = [call for call in candidates if call.start > attention_call.end]
        return later[0] if len(later) == 1 else None
    if any(call.is_linear and call.enclosing[-1] is block.call for call in term.output.calls):
        return None
    sources = [call for call in candidates if term.output.is_from(call)]
    if sources:
        return sources[-1]
    for call in reversed(candidates):
        after_attention = attention_call is None or call.start > attention_call.end
        if after_attention and call.end <= term.output.calls[-1].end:
            return call
    return None


def _mlp_candidates(block: Block) -> list[ModuleCall]:
    """Returns the direct submodules of the block, other than attention, that contain matrices."""
    attention_call = block.attention_call
    candidates = []
    for call in block.recording.calls_within(block.call):
        if call.enclosing[-1] is not block.call or call.is_linear:
            continue
        if attention_call is not None and (
            call is attention_call or call in attention_call.enclosing
        ):
            continue
        if _has_matrix(call) and block.recording.runs_once(call):
            candidates.append(call)
    return candidates


def _has_matrix(call: ModuleCall) -> bool:
    return any(weight.ndim > 1 for weight in call.module.parameters())


def _mlp_calls(block: Block, mlp: ModuleCall | None) -> list[ModuleCall]:
    """Returns the calls inside the MLP. If it is no module, those in the block after attention."""
    recording, attention_call = block.recording, block.attention_call
    if mlp is not None:
        return recording.calls_within(mlp)
    if block.mlp_term is None or attention_call is None:
        return []
    end = block.mlp_term.output.calls[-1].end
    calls = []
    for call in recording.calls_within(block.call):
        is_between = call.start > attention_call.end and call.end <= end
        if is_between and recording.runs_once(call):
            calls.append(call)
    return calls


def _locate_mlp_in(block: Block, entry: ModuleCall, calls: list[ModuleCall]) -> None:
    """Locates mlp_in at the input of the MLP's module or first matrix, if a matrix reads it."""
    value = block.recording.by_token(entry.input)
    if value is not None and value.shape[-1] == block.pre.shape[-1]:
        readers = [call for call in calls if call.is_linear or _has_matrix(call)]
        if any(equal_values(call.input, value) for call in readers):
            location = ModuleLocation(entry.path, "input", flat=is_flat(entry.input))
            block.locations["mlp_in"] = location
            return
    block.missing["mlp_in"] = UNPROVED + "no matrix of the MLP reads what its module is given"


def _gives_mlp_output(block: Block, mlp: ModuleCall | None, last: ModuleCall) -> bool:
    """True if the last matrix returns the MLP's output, and so reads all neurons of a token."""
    if not block.recording.runs_once(last) or block.recording.by_token(last.input) is None:
        return False
    if block.mlp_term is not None and equal_values(last.output, block.mlp_term.output.value):
        return True
    return mlp is not None and equal_values(last.output, mlp.output)


def _locate_mlp_pre(block: Block, calls: list[ModuleCall], last: ModuleCall) -> None:
    """Locates mlp_pre at the matrix whose output, or half of it, an activation reads."""
    activation_inputs = _activation_inputs(calls)
    d_mlp = last.input.shape[-1] if last.input is not None else 0
    for call in calls:
        if not call.is_linear or call is last or not block.recording.runs_once(call):
            continue
        output = block.recording.by_token(call.output)
        if output is None:
            continue
        is_fused = output.shape[-1] == 2 * d_mlp
        parts = output.split(d_mlp, dim=-1) if is_fused else (output,)
        for number, part in enumerate(parts):
            if part.shape[-1] != d_mlp:
                continue
            if any(equal_values(part, value) for value in activation_inputs):
                block.locations["mlp_pre"] = ModuleLocation(
                    call.path,
                    cut="d_mlp | d_mlp" if is_fused else "",
                    part=number,
                    flat=is_flat(call.output),
                )
                return
    block.missing["mlp_pre"] = UNPROVED + "no matrix's output is what the MLP's activation reads"


def _activation_inputs(calls: list[ModuleCall]) -> list[Tensor]:
    """Returns the inputs of activation modules and of activation functions in the MLP."""
    inputs: list[Tensor] = []
    for call in calls:
        is_leaf = not call.is_linear and not any(True for _ in call.module.children())
        is_norm = "norm" in type(call.module).__name__.lower()
        value = call.input
        if is_leaf and not is_norm and value is not None and not equal_values(value, call.output):
            inputs.append(value)
    owners: dict[ModuleCall, None] = {}
    for call in calls:
        owners[call] = None
        owners[call.enclosing[-1]] = None
    for owner in owners:
        for function_call in owner.function_calls:
            if function_call.kind == "activation" and function_call.inputs:
                inputs.append(function_call.inputs[0])
    return inputs


def _locate_router(block: Block, calls: list[ModuleCall]) -> None:
    """Locates the sites of a module that rates the experts for each token."""
    block.missing |= dict.fromkeys(NO_ROUTER, "no router was seen in this block's MLP")
    for call in calls:
        logits = _router_logits(block, call)
        if logits is None:
            continue
        block.locations["router_logits"] = ModuleLocation(call.path, "inside", "router", flat=True)
        if len(call.outputs) == 3 and _is_choice(call.outputs[1], call.outputs[2], logits):
            block.locations["expert_weights"] = ModuleLocation(call.path, item=1, flat=True)
            block.locations["experts"] = ModuleLocation(call.path, item=2, flat=True)
        else:
            reason = (
                UNPROVED + f"the router {call.name!r} does not give logits, weights and indices"
            )
            block.missing |= dict.fromkeys(("expert_weights", "experts"), reason)
        return


def _router_logits(block: Block, call: ModuleCall) -> Tensor | None:
    """Returns a router's logits [tokens, expert]: the output of the first linear map in it."""
    if len(call.outputs) < 2 or any(output is None for output in call.outputs):
        return None
    if not block.recording.runs_once(call):
        return None
    function_calls = block.recording.function_calls_within(call)
    linear_outputs = [linear.output for linear in function_calls if linear.kind == "linear"]
    if not linear_outputs:
        return None
    logits = linear_outputs[0]
    tokens = block.recording.rows * block.recording.width
    is_output = any(output.shape == logits.shape for output in call.outputs)
    return logits if is_output and logits.ndim == 2 and len(logits) == tokens else None


def _is_choice(weights: Tensor, experts: Tensor, logits: Tensor) -> bool:
    """True for a weight and the number of an expert for each token and choice."""
    return (
        weights.is_floating_point()
        and not experts.is_floating_point()
        and weights.shape == experts.shape
        and experts.ndim == 2
        and len(experts) == len(logits)
        and experts.shape[-1] <= logits.shape[-1]
    )
