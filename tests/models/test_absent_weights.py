"""The modules of a model that is in another process have weights without values."""

import copy

import pytest
import torch
from torch import nn

import hookkit as hk
from hookkit.models.absent_weights import mark_absent
from hookkit.models.devices import count_parameters


def tied_model() -> nn.Module:
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        model["norm"] = nn.BatchNorm1d(4)
    return model


def test_shapes_dtypes_and_ties_remain():
    plain, model = tied_model(), tied_model()
    mark_absent(model)
    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        name: weight.shape for name, weight in plain.named_parameters()
    }
    assert model["embed"].weight is model["head"].weight
    assert count_parameters(model) == count_parameters(plain)
    assert all(isinstance(weight, nn.Parameter) for weight in model.parameters())


COMPUTATIONS = {
    "a forward": lambda model: model["embed"](torch.tensor([1])),
    "a product": lambda model: torch.ones(2, 4) @ model["head"].weight.T,
    "a row": lambda model: model["head"].weight[3],
    "a buffer": lambda model: model["norm"].running_mean + 1,
    "values": lambda model: model["head"].weight.tolist(),
    "the state": lambda model: model.state_dict(),
    "a copy": copy.deepcopy,
    "another dtype": lambda model: model.to(torch.float64),
    "another device": lambda model: model.to("cpu"),
    "a change": lambda model: nn.init.zeros_(model["head"].weight),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_every_computation_with_them_says_where_they_are(name):
    model = tied_model()
    mark_absent(model)
    with pytest.raises(hk.errors.Unsupported, match="process of vLLM"):
        COMPUTATIONS[name](model)
