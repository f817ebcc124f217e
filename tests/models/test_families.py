"""The table of families: every row's places are in the model, and what is missing says why."""

import pytest

import hookkit as hk
from hookkit.models.families.table import FAMILIES
from hookkit.models.sites import AXES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_place_is_in_the_model_and_every_site_has_a_place_or_a_reason(model_type):
    lm = hk.tiny(model_type)
    family = lm.family
    assert set(family.locations) | set(family.missing) == set(AXES)
    for name in AXES:
        assert (name in lm.layout.names) or family.missing.get(name), name
        if lm.layout.layers(name) not in (None, list(range(lm.n_layers))):
            assert family.missing.get(name), (
                f"{name} is not in every block, and the row does not say why"
            )
    for site in lm.sites():
        lm.submodule(lm.location(site).path)
