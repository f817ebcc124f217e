"""What is meant where nothing is said: a default is part of what a number means, so that none changes unseen."""

import inspect

import pytest
import typer

import hookkit as hk
from hookkit.cli import app

CALLS: dict[str, dict[str, object]] = {
    "ablate": {"to": "zero"},
    "ablations": {"to": "zero"},
    "compare_attributions": {"top": 10},
    "effect_at_damage": {"by": "damage_kl", "toward": 1},
    "evaluate": {"batch_size": 8, "seed": 0},
    "attribution_graph": {
        "max_features": 4096,
        "beyond": "raise",
        "max_logits": 10,
        "logit_share": 0.95,
        "batch_size": 64,
    },
    "attribution": {"direction": "denoise", "method": "gradient"},
    "calibration": {"bins": 10},
    "capture": {"grad": False},
    "causal_tracing": {"site": "resid_post", "window": 1, "noise": 3.0, "samples": 10, "seed": 0},
    "circuit": {"greedy": False},
    "compare_circuits": {"ablate": "counterfactual"},
    "faithfulness": {"ablate": "counterfactual", "draws": 3},
    "minimality": {"ablate": "counterfactual"},
    "run_circuit": {"ablate": "counterfactual", "logits": "all"},
    "compare_generations": {"along": "baseline", "top": 5},
    "model_diff": {"cka": True, "rank_pos": -1, "top": 10, "tolerance": 1e-4, "details": 3},
    "direct_logits": {"pos": -1, "heads": False, "neurons": False},
    "dose_response": {"samples": 20, "seed": 0},
    "edge_attribution": {"direction": "noise", "method": "gradient"},
    "fit_jacobian": {"window": 128, "skip": 16, "batch_tokens": 2048},
    "edge_mask": {"steps": 100, "lr": 0.3, "batch_size": 8, "seed": 0},
    "fit_probe": {"pos": -1, "folds": 5, "c": 0.01, "shuffles": 20, "seed": 0},
    "fit_subspace": {
        "pos": -1,
        "held_out": 0.4,
        "epochs": 20,
        "patience": 3,
        "lr": 0.1,
        "draws": 5,
        "seed": 0,
    },
    "fit_vector": {"steps": 50, "lr": 0.02},
    "fork": {"row": 0},
    "forward": {"logits": "all"},
    "generate": {"logits": "all"},
    "gradients": {"pos": -1},
    "feature": {"pos": slice(1, None), "top": 10, "effects": 10, "seed": 0},
    "harvest": {"long": "error", "on_error": "error"},
    "head_scores": {"n": 20, "length": 25, "seed": 0},
    "heat_map": {"y": "layer", "named": 3},
    "kl": {"pos": -1},
    "load": {"trust_remote_code": False},
    "load_probe": {"any_model": False},
    "load_subspace": {"any_model": False},
    "load_vector": {"any_model": False},
    "logit_bars": {"top": 20},
    "logit_lens": {"sites": "resid_post", "pos": -1, "top": 5, "choose": "layer"},
    "logit_path": {"pos": -1, "top": 3},
    "logit_terms": {"pos": -1, "row": 0, "top": 10},
    "mean_difference": {"pos": -1},
    "compare_results": {"tolerance": 1e-4},
    "mean_over_doses": {"confidence": 0.95, "resamples": 2000, "seed": 0},
    "mean_over_prompts": {"confidence": 0.95, "resamples": 2000, "seed": 0},
    "patching": {"direction": "denoise"},
    "patchscope": {"sites": "resid_post", "pos": -1, "max_new_tokens": 8},
    "path_patching": {"senders": "z"},
    "principal_direction": {"pos": -1},
    "qk": {"distance": 0},
    "rank_shift": {"top": 10, "movers": 3},
    "ranks": {"top": 10},
    "record": {"replace": False},
    "token_losses": {"top": 0},
    "shift_report": {
        "top": 10,
        "heads": False,
        "generate": 0,
        "details": 3,
        "figures": 1,
        "seed": 0,
    },
    "shift_summary": {"top": 10},
    "activation_statistics": {"covariance": False, "top": 0, "long": "error", "on_error": "error"},
    "steer": {"scale": 1.0},
    "stream": {"logits": "last"},
    "surprisal": {"top": 0},
    "surprisal_shift": {"worst_first": False},
    "sweep": {"pos": -1, "verify": 0},
    "token_attribution": {"method": "gradient", "pos": -1},
    "trace": {"top": 5},
    "train_dictionary": {
        "features": None,
        "k": 32,
        "architecture": "topk",
        "epochs": 6,
        "batch_size": 512,
        "learning_rate": None,
        "seed": 0,
    },
    "train_lens": {
        "sites": "resid_post",
        "window": 128,
        "steps": 100,
        "states": 8,
        "lr": 2e-4,
        "seed": 0,
    },
}

COMMANDS: dict[str, dict[str, float]] = {
    "compare": {"max_new_tokens": 20, "top": 5},
    "dictionary": {"site": "resid_post.12", "k": 32, "epochs": 6, "seed": 0},
    "diff": {"tolerance": 1e-4},
    "direct": {"top": 15, "pos": -1},
    "feature": {"top": 10, "effects": 10},
    "generate": {"max_new_tokens": 20},
    "lens": {"top": 3},
    "patch": {"top": 10},
    "ranks": {"top": 10},
    "run": {"tolerance": 1e-4},
    "scan": {"top": 5},
    "shift": {"top": 10, "movers": 3, "generate": 0, "seed": 0},
    "show": {"tolerance": 1e-4, "rows": 12},
    "steer": {"max_new_tokens": 20},
    "surprisal": {"top": 3},
    "trace": {"max_new_tokens": 20, "top": 5},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_means_what_it_meant_where_nothing_is_said(name):
    modules = (hk, hk.metrics, hk.figures, hk.stats, hk.results)
    function = next(getattr(module, name) for module in modules if name in dir(module))
    parameters = inspect.signature(function).parameters
    assert {word: parameters[word].default for word in CALLS[name]} == CALLS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_means_what_it_meant_where_nothing_is_said(name):
    command = typer.main.get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    defaults = {option.name: option.default for option in command.params}
    assert {word: defaults[word] for word in COMMANDS[name]} == COMMANDS[name]
