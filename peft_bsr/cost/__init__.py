"""What training costs: saved activations, FLOPs and time, measured; and the paper's accounting of memory and MACs."""

from peft_bsr.cost.block_contributions import Contributions, contributions
from peft_bsr.cost.budget import BudgetPlan, parse_size, plan_for_budget
from peft_bsr.cost.comparison import Cost, TrainingStep, compare, cost_rows, cost_table
from peft_bsr.cost.estimation import Estimate, estimate
from peft_bsr.cost.flops import count_flops, flops_by_module
from peft_bsr.cost.memory import ModelMemory, PeakMemory, model_memory
from peft_bsr.cost.paper import Dimensions, PaperCost, paper_cost
from peft_bsr.cost.plan_costs import PlanCosts
from peft_bsr.cost.setup import Setup
from peft_bsr.engine import saved_activations, saved_by_module

__all__ = [
    "BudgetPlan",
    "Contributions",
    "Cost",
    "Dimensions",
    "Estimate",
    "ModelMemory",
    "PaperCost",
    "PeakMemory",
    "PlanCosts",
    "Setup",
    "TrainingStep",
    "compare",
    "contributions",
    "cost_rows",
    "cost_table",
    "count_flops",
    "estimate",
    "flops_by_module",
    "model_memory",
    "paper_cost",
    "parse_size",
    "plan_for_budget",
    "saved_activations",
    "saved_by_module",
]
