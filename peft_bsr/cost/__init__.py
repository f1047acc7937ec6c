"""What training costs: saved activations, FLOPs and time, measured."""

from peft_bsr.cost.compare import Cost, compare, cost_table
from peft_bsr.cost.flops import count_flops
from peft_bsr.cost.saved import saved_activations

__all__ = ["Cost", "compare", "cost_table", "count_flops", "saved_activations"]
