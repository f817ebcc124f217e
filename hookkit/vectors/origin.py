"""What a vector was made with: the model by its weights, the prompts by their tokens; plain values for JSON."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..about import about_model, config_hash, weights_hash
from ..errors import OtherModel
from ..model import LM
from ..prompts import Row
from ..wrapped import adapters_in_use

SAME = ("weights_sha256", "config_sha256", "adapters")  # what makes two models one; the name is for the reader


def model_words(lm: LM) -> dict[str, Any]:
    """The model by its name, and by the hashes of its weights and configuration and the adapters that act."""
    hashes = {"weights_sha256": weights_hash(lm), "config_sha256": config_hash(lm)}
    return {"model": about_model(lm)["model"], **hashes, "adapters": adapters_in_use(lm.root)}


def data_hash(*sets: Sequence[Row]) -> str:
    """The sha256 of sets of prompts, as tokens, in their order."""
    return hashlib.sha256(json.dumps([[list(row) for row in rows] for rows in sets]).encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which of the words that make a model this one two descriptions differ, as far as both have them."""
    return [word for word in SAME if word in one and word in other and one[word] != other[word]]


def check_same_model(about: Mapping[str, Any], lm: LM) -> None:
    """Raise `OtherModel` where a vector was made with another model than this one."""
    here = model_words(lm)
    gone = [word for word in SAME if word not in about]
    differ = gone or differences(about, here)
    if differ:
        words = "says nothing of" if gone else "differs in"
        raise OtherModel(
            f"the vector was made with {about.get('model', 'a model without a name')}, and this is {here['model']}; it "
            f"{words} {', '.join(differ)}: load it with its own model, or say any_model=True if that is meant"
        )
