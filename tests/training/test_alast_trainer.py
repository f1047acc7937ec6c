"""ALaST in Trainer: a checkpoint goes on where it stopped, and the record is drawn."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import Trainer, set_seed

from peft_bsr import AdapterError, ALaSTConfig, FeatureCache, FeatureCacheError
from peft_bsr.training import ALaSTCallback
from peft_bsr.viz import draw_budgets
from tests.training.test_trainer import Blobs, make_trainer


def alast_trainer(make_model, folder, **arguments: object) -> tuple[Trainer, ALaSTCallback]:
    set_seed(0)
    config = ALaSTConfig(trainable_blocks_per_step=2, alpha="lr", delta_reduction="paper", selection="sample")
    trainer = make_trainer(get_peft_model(make_model(), config), folder, **arguments)
    callback = ALaSTCallback()
    trainer.add_callback(callback)
    return trainer, callback


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(make_model, tmp_path):
    whole, record = alast_trainer(make_model, tmp_path / "whole")
    whole.train()
    resumed, later = alast_trainer(make_model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert later.history == record.history[6:]
    assert [entry.step for entry in record.history] == list(range(1, 13))
    assert len({entry.selected for entry in record.history}) > 1
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("arguments", [{"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_one_draw_for_each_optimizer_step(arguments, make_model, tmp_path):
    trainer, record = alast_trainer(make_model, tmp_path, max_steps=4, save_strategy="no", **arguments)
    trainer.train()
    assert trainer.model.base_model.schedule().step == 4 == len(record.history)
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert trainer.model.base_model.schedule().learning_rate in rates | {trainer.args.learning_rate}


def test_budgets_are_logged_and_drawn(make_model, tmp_path):
    trainer, record = alast_trainer(make_model, tmp_path, max_steps=3, save_strategy="no")
    logs = {"loss": 1.0}
    trainer.train()
    record.on_log(None, None, None, logs=logs, model=trainer.model)
    assert logs["budget_min"] <= logs["budget_mean"] <= logs["budget_max"]
    picture = draw_budgets(record.history, tmp_path / "budgets.png")
    assert Image.open(picture).size > (500, 200)


def test_other_models_are_refused(make_model):
    with pytest.raises(AdapterError, match="has no active ALaST adapter"):
        ALaSTCallback().on_step_end(None, None, None, model=make_model())


def test_a_plan_that_changes_cannot_be_cached(make_model, tmp_path):
    model = get_peft_model(make_model(), ALaSTConfig())
    with pytest.raises(FeatureCacheError, match="plan changes from step to step"):
        FeatureCache.build(model, Blobs(4, seed=0), tmp_path)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="`history` is empty"):
        draw_budgets([], tmp_path / "budgets.png")
