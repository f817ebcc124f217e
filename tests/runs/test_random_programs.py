"""Random programs of hooks, of every family, against plain transformers; random_programs.py says how."""

import by_hand_programs
import pytest
import random_programs
import torch

import hookkit as hk

EACH = 5  # programs of a family: about 320 in all


@pytest.mark.parametrize("family", random_programs.NAMES)
def test_random_programs_give_what_hooks_written_by_hand_give(family):
    found = random_programs.differences(family, range(EACH))
    assert not found, "\n\n".join(found)


def test_a_difference_is_found_and_made_small(monkeypatch):
    """The second route is broken: `scale` adds. A program with more hooks comes down to the one that differs."""
    lm = hk.tiny("llama")
    scaled = by_hand_programs.Act("scale", "resid_post", 1, values={"factor": 0.5})
    other = by_hand_programs.Act("edit", "mlp_out", 0, values={"function": torch.tanh})
    other.values["function"] = random_programs.tanh
    program = random_programs.Program(
        "llama", 0, "forward", [[5, 6, 7]], [other, scaled], {"logits": "all"}
    )
    assert random_programs.difference(lm, program) == ""
    monkeypatch.setitem(by_hand_programs.VERBS, "scale", lambda part, values, spot: part + 1)
    small, words = random_programs.shrunk(lm, program)
    assert "apart by" in words
    assert [act.verb for act in small.acts] == ["scale"]
    assert "hk.scale('resid_post.1', 0.5)" in small.source()
