"""The first tab: the user's question, the plans that fit, and the code that runs each plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft_bsr.app.models import config_of, costs_of, model_name, own_size
from peft_bsr.app.results import measured, plan_key
from peft_bsr.backbones import BackboneForImageClassification
from peft_bsr.cli.memory import OPTIMIZERS, PRECISIONS
from peft_bsr.cli.plan import command_of
from peft_bsr.cli.sources import changed, trainable_class
from peft_bsr.cost import BudgetPlan, PlanCosts, Setup, plan_for_budget
from peft_bsr.cost.budget import missing_estimate, plan_setting
from peft_bsr.cost.ways import SMALLEST, Setting, settings_of, ways_of
from peft_bsr.errors import UsageError
from peft_bsr.training import default_learning_rate

CARDS = {  # GiB
    "T4, 16 GB": 16,
    "RTX 3060, 12 GB": 12,
    "RTX 4060, 8 GB": 8,
    "RTX 4090, 24 GB": 24,
    "RTX 5090, 32 GB": 32,
    "A10G, 24 GB": 24,
    "L4, 24 GB": 24,
    "L40S, 48 GB": 48,
    "A100, 40 GB": 40,
    "A100 or H100, 80 GB": 80,
}
USABLE = 0.9  # of a card: the rest is for CUDA itself, the allocator and, on some cards, error correction
_MOST = {"batch_size": 4096, "image_size": 2048, "labels": 100_000}


@dataclass(frozen=True)
class Question:
    """Input of the planner.

    Attributes:
        source: Hub id or folder of a model.
        gib: Memory in GiB.
        batch_size: Images per step.
        image_size: Pixels per side. 0: the default of `peft-bsr train`.
        optimizer: One of `peft-bsr plan --optimizer`.
        precision: `"fp32"`, `"bf16"` or `"fp16"`.
        compile: Whether the model is compiled; this takes 10 to 30 seconds per plan.
        device: `"cpu"` or `"cuda"`, the device whose operations are counted.
        labels: Number of classes of the head.
    """

    source: str
    gib: float
    batch_size: int = 32
    image_size: int = 0
    optimizer: str = "adamw_fused"
    precision: str = "fp32"
    compile: bool = False
    device: str = "cpu"
    labels: int = 10

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("there is no model. Select one, or enter a Hub id or a folder.")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not (name != "image_size") <= value <= most:
                raise UsageError(f"`{name}={value!r}` must be a whole number of at most {most}.")

    @property
    def setup(self) -> Setup:
        """Setup for `plan_for_budget`."""
        return Setup(
            batch_size=self.batch_size,
            image_size=self.image_size or own_size(self.source),
            optimizer=self.optimizer,
            device=self.device,
            autocast=PRECISIONS[self.precision],
            compile=self.compile,
        )

    @property
    def memory(self) -> str:
        """Budget for `plan_for_budget`."""
        return f"{self.gib:g}GiB"


def plans_of(question: Question) -> Iterator[list[BudgetPlan]]:
    """The plans that fit, ordered by how little they give up, in growing lists: one after each estimate.

    Plans whose estimates are cached come first. Without one it is the plan that gives up most, which is likely to fit.
    A list may be equal to the one before, or empty.

    Args:
        question: Input of the planner.

    Raises:
        PeftBsrError: If the model cannot be read or planned for, or nothing fits.
    """
    asked, found = _asked(question), _known(question)

    def estimated(i: int) -> Iterator[list[BudgetPlan]]:
        while missing := missing_estimate(*asked[i]):
            asked[i][0](*missing)  # `costs_of` may have forgotten them
            yield _in_order(found)
        plan = plan_setting(*asked[i])
        if plan is not None:
            found[i] = plan
            yield _in_order(found)

    if found:
        yield _in_order(found)
    for i in range(len(asked))[SMALLEST]:
        if not found:
            yield from estimated(i)
    if not found:
        costs, _, memory, setup = asked[0]
        plan_for_budget(costs, memory, setup)  # raises an error that describes the smallest plan
    for i in range(len(asked)):
        if i not in found:
            yield from estimated(i)


def known_plans(question: Question) -> list[BudgetPlan]:
    """The plans of `plans_of` whose estimates are cached; nothing is estimated."""
    return _in_order(_known(question))


def _known(question: Question) -> dict[int, BudgetPlan]:
    plans = {i: plan_setting(*one) for i, one in enumerate(_asked(question)) if not missing_estimate(*one)}
    return {i: plan for i, plan in plans.items() if plan is not None}


def _asked(question: Question) -> list[tuple[PlanCosts, Setting, str, Setup]]:
    """Arguments of `plan_setting` for every setting."""
    costs, setup = costs_of(question.source, question.labels), question.setup
    return [(costs, setting, question.memory, setup) for setting in settings_of(costs.spec)]


def _in_order(found: dict[int, BudgetPlan]) -> list[BudgetPlan]:
    return [found[i] for i in sorted(found)]


def fill(question: Question) -> Iterator[None]:
    """Fill the cache with the estimates for other budgets, so that a change of memory is fast; can stop at any step."""
    costs, setup = costs_of(question.source, question.labels), question.setup
    if setup.compile:
        return  # a budget needs few of them, and each is slow
    for setting in settings_of(costs.spec):
        for way in ways_of(setting, setup, costs.dtype, costs.allows):
            if not isinstance(way, str):
                costs(way.config, way.setup)
                yield


def accuracies_of(plan: BudgetPlan, depth: int) -> dict[str, float]:
    """Benchmark results of the plan: dataset -> accuracy; empty if it was not measured.

    Args:
        plan: The plan.
        depth: Number of blocks of the model.
    """
    return measured(plan_key(plan.config, plan.estimate.plan), depth)


def python_of(plan: BudgetPlan, question: Question) -> str:
    """Python code that trains the model with the plan."""
    source = model_name(question.source)
    setup, options = plan.setup, {} if plan.config is None else changed(plan.config)
    rate = default_learning_rate("full" if plan.config is None else "bsr", options)
    arguments: dict[str, object] = {"per_device_train_batch_size": setup.batch_size, "learning_rate": rate}
    arguments |= {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "remove_unused_columns": False}
    arguments |= dict(pair.split("=", 1) for pair in OPTIMIZERS[setup.optimizer])
    arguments |= {} if question.precision == "fp32" else {question.precision: True}
    arguments |= {"torch_compile": True} if setup.compile else {}
    if setup.gradient_checkpointing:
        offload = {"offload": True} if setup.gradient_checkpointing == "offload" else {}
        arguments |= {"gradient_checkpointing": True}
        arguments |= {"gradient_checkpointing_kwargs": {"use_reentrant": False} | offload}
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    adapter = ", ".join(f"{name}={value!r}" for name, value in options.items())
    own = trainable_class(source, config_of(source))
    made = f"{own.__name__}.from_pretrained({source!r}, num_labels={question.labels}, "
    made += "ignore_mismatched_sizes=True)"
    is_headless = own is BackboneForImageClassification
    if is_headless:
        made = f"with_head(AutoModel.from_pretrained({source!r}), {question.labels})"
    lines = [
        f"from transformers import {'AutoModel' if is_headless else own.__name__}, Trainer, TrainingArguments",
        *([] if plan.config is None else ["from peft import get_peft_model", "from peft_bsr import BSRConfig"]),
        *(["from peft_bsr import set_image_size"] if setup.image_size else []),
        *(["from peft_bsr import with_head"] if is_headless else []),
        "",
        f"model = {made}",
        *([f"set_image_size(model, {setup.image_size})"] if setup.image_size else []),
        *([] if plan.config is None else [f"model = get_peft_model(model, BSRConfig({adapter}))"]),
        f'arguments = TrainingArguments("checkpoints", {words})',
        "Trainer(model=model, args=arguments, train_dataset=train_dataset).train()",
    ]
    return "\n".join(lines)


def shell_of(plan: BudgetPlan, question: Question) -> str:
    """Command that trains the model with the plan on a folder of images by class."""
    return command_of(plan, model_name(question.source), ["--dataset", "photos", "--output", "out"])


__all__ = ["CARDS", "USABLE", "Question", "accuracies_of", "fill", "known_plans", "plans_of", "python_of", "shell_of"]
