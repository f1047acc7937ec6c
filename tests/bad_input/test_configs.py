"""Configurations that cannot be: each is refused when it is made, with its own text."""

from __future__ import annotations

from typing import Any

import pytest

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, MoEConfig, SynQTConfig, TaskConfig

CONFIGS: list[tuple[type, dict[str, Any], str]] = [
    (
        BSRConfig,
        {"trainable_blocks": [True]},
        "BSRConfig: `trainable_blocks=[True]` must be a non-empty list of block indices, "
        '"every:n", "last:n", "last:n%" or "stage:n".',
    ),
    (
        BSRConfig,
        {"trainable_blocks": "last:0"},
        "BSRConfig: `trainable_blocks='last:0'` is not understood. Use indices such as `[3, 7, 11]`, "
        '"every:4", "last:3", "last:75%" or "stage:4".',
    ),
    (
        BSRConfig,
        {"trainable_blocks": "last:101%"},
        "BSRConfig: `trainable_blocks='last:101%'` is not understood. Use indices such as `[3, 7, 11]`, "
        '"every:4", "last:3", "last:75%" or "stage:4".',
    ),
    (
        BSRConfig,
        {"trainable_blocks": "last:-1"},
        "BSRConfig: `trainable_blocks='last:-1'` is not understood. Use indices such as `[3, 7, 11]`, "
        '"every:4", "last:3", "last:75%" or "stage:4".',
    ),
    (
        BSRConfig,
        {"trainable_blocks": [1.0]},
        "BSRConfig: `trainable_blocks=[1.0]` must be a non-empty list of block indices, "
        '"every:n", "last:n", "last:n%" or "stage:n".',
    ),
    (
        BSRConfig,
        {"trainable_blocks": {"a": 1}},
        "BSRConfig: `trainable_blocks={'a': 1}` must be a non-empty list of block indices, "
        '"every:n", "last:n", "last:n%" or "stage:n".',
    ),
    (
        BSRConfig,
        {"reduction_blocks": 3},
        "BSRConfig: `reduction_blocks=3` must be a list of block indices or None.",
    ),
    (
        BSRConfig,
        {"reduction_blocks": [False]},
        "BSRConfig: `reduction_blocks=[False]` must be a list of block indices or None.",
    ),
    (
        BSRConfig,
        {"keep_rate": float("nan")},
        "BSRConfig: `keep_rate=nan` holds nan; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        BSRConfig,
        {"keep_rate": True},
        "BSRConfig: `keep_rate=True` holds True; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        BSRConfig,
        {"keep_rate": ["0.5"]},
        "BSRConfig: `keep_rate=['0.5']` holds '0.5'; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        BSRConfig,
        {"keep_rate": float("inf")},
        "BSRConfig: `keep_rate=inf` holds inf; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        BSRConfig,
        {"trainable": ["full"]},
        "BSRConfig: `trainable=['full']` is unknown. Use one of 'full', 'lora'.",
    ),
    (
        BSRConfig,
        {"lean": "most"},
        "BSRConfig: `lean='most'` is unknown. Use one of 'off', 'exact', 'max'.",
    ),
    (
        BSRConfig,
        {"saved_activations": "int4"},
        "BSRConfig: `saved_activations='int4'` is unknown. Use one of 'full', 'int8'.",
    ),
    (
        BSRConfig,
        {"r": "8"},
        "BSRConfig: `r='8'` must be an integer from 1 to 65536.",
    ),
    (
        BSRConfig,
        {"r": True},
        "BSRConfig: `r=True` must be an integer from 1 to 65536.",
    ),
    (
        BSRConfig,
        {"lora_alpha": float("nan")},
        "BSRConfig: `lora_alpha=nan` must be a number above 0, 1e+06 at most.",
    ),
    (
        BSRConfig,
        {"lora_alpha": "16"},
        "BSRConfig: `lora_alpha='16'` must be a number above 0, 1e+06 at most.",
    ),
    (
        BSRConfig,
        {"target_modules": [""]},
        "BSRConfig: `target_modules=['']` must be a list of names, a regular expression or None.",
    ),
    (
        BSRConfig,
        {"target_modules": {"q_proj": 1}},
        "BSRConfig: `target_modules={'q_proj': 1}` must be a list of names, a regular expression or None.",
    ),
    (
        BSRConfig,
        {"modules_to_save": "classifier("},
        "BSRConfig: `modules_to_save='classifier('` must be a list of names or None.",
    ),
    (
        BSRConfig,
        {"modules_to_save": ["("]},
        "BSRConfig: `modules_to_save=['(']` is not a regular expression: missing ), unterminated subpattern "
        "at position 0.",
    ),
    (
        BSRConfig,
        {"layout": ["a"]},
        "BSRConfig: `layout=['a']` must map each place to a module name, or be None.",
    ),
    (
        BSRConfig,
        {"layout": {"a": 1}},
        "BSRConfig: `layout={'a': 1}` must map each place to a module name, or be None.",
    ),
    (
        BSRConfig,
        {"task_type": "NOPE"},
        "BSRConfig: Invalid task type: 'NOPE'. Must be one of the following task types: SEQ_CLS, "
        "SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.",
    ),
    (
        BSRConfig,
        {"task_type": []},
        "BSRConfig: Invalid task type: '[]'. Must be one of the following task types: SEQ_CLS, SEQ_2_SEQ_LM, "
        "CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.",
    ),
    (
        BSRConfig,
        {"tasks": 5},
        "BSRConfig: `tasks=5` must name at least one task with its number of classes or its TaskConfig, such "
        'as `{"cifar10": 10, "depth": TaskConfig("depth", 1, "regression_map")}`.',
    ),
    (
        BSRConfig,
        {"tasks": {"a": 0}},
        "BSRConfig: `tasks`: task 'a': `num_outputs=0` must be an integer from 1 to 262144.",
    ),
    (
        BSRConfig,
        {"tasks": {"a": True}},
        "BSRConfig: `tasks`: task 'a': `num_outputs=True` must be an integer from 1 to 262144.",
    ),
    (
        BSRConfig,
        {"tasks": {"": 2}},
        "BSRConfig: `tasks`: `name=''` must be a string.",
    ),
    (
        BSRConfig,
        {"tasks": {"a": "b"}},
        "BSRConfig: `tasks`: task 'a': `num_outputs='b'` must be an integer from 1 to 262144.",
    ),
    (
        BSRConfig,
        {"moe": 3, "tasks": {"a": 2}},
        "BSRConfig: `moe=3` must be a MoEConfig or None.",
    ),
    (
        BSRConfig,
        {"moe": {"top_k": 20}, "tasks": {"a": 2}},
        "BSRConfig: `moe`: `top_k=20` must not be larger than `num_experts=16`.",
    ),
    (
        BSRConfig,
        {"tasks": {"a": 2}, "task_weights": {"a": -1}},
        "BSRConfig: `task_weights={'a': -1}` must give numbers of at least 0 to some of the tasks ['a'].",
    ),
    (
        BSRConfig,
        {"tasks": {"a": 2}, "task_weights": [1]},
        "BSRConfig: `task_weights=[1]` must give numbers of at least 0 to some of the tasks ['a'].",
    ),
    (
        BSRConfig,
        {"preset": "mine"},
        "BSRConfig: `preset='mine'` is unknown. Use 'balanced', 'lora', 'paper' or None.",
    ),
    (
        BSRConfig,
        {"preset": ["paper"]},
        "BSRConfig: `preset=['paper']` is unknown. Use 'balanced', 'lora', 'paper' or None.",
    ),
    (
        ALaSTConfig,
        {"trainable_blocks_per_step": 0},
        "ALaSTConfig: `trainable_blocks_per_step=0` must be an integer of at least 1, or None.",
    ),
    (
        ALaSTConfig,
        {"trainable_blocks_per_step": 2.0},
        "ALaSTConfig: `trainable_blocks_per_step=2.0` must be an integer of at least 1, or None.",
    ),
    (
        ALaSTConfig,
        {"initial_budget": 0.2},
        "ALaSTConfig: `initial_budget=0.2` must lie in `budget_range=[0.5, 1.0]`.",
    ),
    (
        ALaSTConfig,
        {"initial_budget": "0.9"},
        "ALaSTConfig: `initial_budget='0.9'` must lie in `budget_range=[0.5, 1.0]`.",
    ),
    (
        ALaSTConfig,
        {"budget_range": [0.5]},
        "ALaSTConfig: `budget_range=[0.5]` must be two numbers, the smallest and the largest budget.",
    ),
    (
        ALaSTConfig,
        {"budget_range": [0.9, 0.5]},
        "ALaSTConfig: `budget_range=[0.9, 0.5]` must lie in (0, 1], the smallest budget first.",
    ),
    (
        ALaSTConfig,
        {"budget_range": [0, 1]},
        "ALaSTConfig: `budget_range=[0, 1]` must lie in (0, 1], the smallest budget first.",
    ),
    (
        ALaSTConfig,
        {"budget_range": "wide"},
        "ALaSTConfig: `budget_range='wide'` must be two numbers, the smallest and the largest budget.",
    ),
    (
        ALaSTConfig,
        {"alpha": -1},
        "ALaSTConfig: `alpha=-1` must be a number from 0 to 1e+06, or 'lr' (the learning rate).",
    ),
    (
        ALaSTConfig,
        {"alpha": "rate"},
        "ALaSTConfig: `alpha='rate'` must be a number from 0 to 1e+06, or 'lr' (the learning rate).",
    ),
    (
        ALaSTConfig,
        {"alpha": float("nan")},
        "ALaSTConfig: `alpha=nan` must be a number from 0 to 1e+06, or 'lr' (the learning rate).",
    ),
    (
        ALaSTConfig,
        {"selection": "random"},
        "ALaSTConfig: `selection='random'` is unknown. Use one of 'prefix', 'sample', 'topk'.",
    ),
    (
        ALaSTConfig,
        {"delta_reduction": "sum"},
        "ALaSTConfig: `delta_reduction='sum'` is unknown. Use one of 'relative', 'paper', 'mean'.",
    ),
    (
        ALaSTConfig,
        {"train_embeddings": "yes"},
        "ALaSTConfig: `train_embeddings='yes'` must be True, False or None.",
    ),
    (
        ALaSTConfig,
        {"seed": 1.5},
        "ALaSTConfig: `seed=1.5` must be an integer.",
    ),
    (
        ALaSTConfig,
        {"preset": "papers"},
        "ALaSTConfig: `preset='papers'` is unknown. Use 'paper' or None.",
    ),
    (
        ALaSTConfig,
        {"mode": "short"},
        "ALaSTConfig: `mode='short'` is unknown. Use one of 'compact', 'full_view'.",
    ),
    (
        ALaSTConfig,
        {"preset": []},
        "ALaSTConfig: `preset=[]` is unknown. Use 'paper' or None.",
    ),
    (
        SynQTConfig,
        {"num_queries": 0},
        "SynQTConfig: `num_queries=0` must be an integer from 1 to 65536.",
    ),
    (
        SynQTConfig,
        {"num_queries": 1.5},
        "SynQTConfig: `num_queries=1.5` must be an integer from 1 to 65536.",
    ),
    (
        SynQTConfig,
        {"bottleneck": 0},
        "SynQTConfig: `bottleneck=0` must be an integer from 1 to 65536.",
    ),
    (
        SynQTConfig,
        {"attention_bottleneck": "8"},
        "SynQTConfig: `attention_bottleneck='8'` must be an integer from 1 to 65536.",
    ),
    (
        SynQTConfig,
        {"feature_scale": "x"},
        "SynQTConfig: `feature_scale='x'` must be a number between -1e+06 and 1e+06.",
    ),
    (
        SynQTConfig,
        {"feature_scale": float("nan")},
        "SynQTConfig: `feature_scale=nan` must be a number between -1e+06 and 1e+06.",
    ),
    (
        SynQTConfig,
        {"dropout": 1.0},
        "SynQTConfig: `dropout=1.0` must be a number in [0, 1).",
    ),
    (
        SynQTConfig,
        {"drop_path": -0.1},
        "SynQTConfig: `drop_path=-0.1` must be a number in [0, 1).",
    ),
    (
        SynQTConfig,
        {"dropout": float("nan")},
        "SynQTConfig: `dropout=nan` must be a number in [0, 1).",
    ),
    (
        SynQTConfig,
        {"layers": []},
        "SynQTConfig: `layers=[]` reads no block. Name some, or leave it None for all.",
    ),
    (
        SynQTConfig,
        {"layers": [2, 2]},
        "SynQTConfig: `layers=[2, 2]` names [2] more than once. Name each block once.",
    ),
    (
        SynQTConfig,
        {"layers": "all"},
        "SynQTConfig: `layers='all'` must be a list of block indices or None.",
    ),
    (
        SynQTConfig,
        {"layers": [-1]},
        "SynQTConfig: `layers=[-1]` has negative indices [-1]. Count blocks from 0.",
    ),
    (
        SynQTConfig,
        {"kept_tokens": "int4"},
        "SynQTConfig: `kept_tokens='int4'` is unknown. Use one of 'full', 'bfloat16', 'float16', 'int8'.",
    ),
    (
        SynQTConfig,
        {"keep_rate": 0},
        "SynQTConfig: `keep_rate=0` holds 0; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        MoEConfig,
        {"num_experts": 0},
        "MoEConfig: `num_experts=0` must be an integer from 1 to 65536.",
    ),
    (
        MoEConfig,
        {"top_k": 0},
        "MoEConfig: `top_k=0` must be an integer from 1 to 65536.",
    ),
    (
        MoEConfig,
        {"expert_type": "tiny"},
        "MoEConfig: `expert_type='tiny'` is unknown. Use 'full' or 'lora'.",
    ),
    (
        MoEConfig,
        {"dropout": 2},
        "MoEConfig: `dropout=2` must be a number in [0, 1).",
    ),
    (
        TaskConfig,
        {"name": "", "num_outputs": 2},
        "TaskConfig: `name=''` must be a string.",
    ),
    (
        TaskConfig,
        {"name": "a", "num_outputs": -1},
        "TaskConfig: task 'a': `num_outputs=-1` must be an integer from 1 to 262144.",
    ),
    (
        TaskConfig,
        {"name": "a", "num_outputs": 2, "kind": "x"},
        "TaskConfig: task 'a': `kind='x'` is unknown. Use one of 'classification', 'regression', "
        "'segmentation', 'regression_map'.",
    ),
]


@pytest.mark.parametrize(
    ("config", "values", "text"), CONFIGS, ids=[f"{i}-{config.__name__}" for i, (config, *_) in enumerate(CONFIGS)]
)
def test_a_configuration_that_cannot_be(config, values, text):
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert str(error.value) == text
