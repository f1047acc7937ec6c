"""Old public names still work, with a warning that says the new one."""

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import peft_bsr
from peft_bsr import backbones
from peft_bsr.training import BudgetRecord


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


def test_old_property_of_a_model():
    vit = ViTForImageClassification(
        ViTConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=2, image_size=32)
    )
    model = get_peft_model(vit, peft_bsr.BSRConfig())
    with pytest.warns(DeprecationWarning, match="`base_model.spec`"):
        assert model.base_model.column is model.base_model.spec


def test_old_field_of_a_budget_record():
    record = BudgetRecord(1, (0.9,), (0,))
    with pytest.warns(DeprecationWarning, match=r"`BudgetRecord\.selected`"):
        assert record.drawn == record.selected
