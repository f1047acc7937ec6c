"""Old public names still work, with a warning that says the new one."""

import pytest
import torch

import peft_bsr
from peft_bsr import backbones


@pytest.mark.parametrize("module", [peft_bsr, backbones], ids=["peft_bsr", "peft_bsr.backbones"])
@pytest.mark.parametrize(("old", "new"), [("Column", "ModelSpec"), ("probe_column", "probe_model")])
def test_old_names(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"`{module.__name__}.{old}` is now called `{new}`"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="has no attribute 'probe_rows'"):
        module.probe_rows  # noqa: B018


def test_old_field_of_a_rule():
    def select(route, arguments):
        return arguments

    with pytest.warns(DeprecationWarning, match="`gather_side_inputs`") as found:
        rule = peft_bsr.FamilyRule(follow_attention=select)
    assert rule == peft_bsr.FamilyRule(gather_side_inputs=select)
    assert found[0].filename == __file__


def test_old_method_of_a_route():
    route, mask = peft_bsr.Route(1, 6, 1), torch.zeros(1, 1, 8, 8)
    with pytest.warns(DeprecationWarning, match="`Route.gather`"):
        assert route.follow(mask) is mask
