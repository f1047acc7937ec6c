"""Plan, and the runner that makes a model's blocks follow it along a route."""

from peft_bsr.engine.plan import BlockPlan, Mode, Plan, ReduceAt, Reduction
from peft_bsr.engine.record import record_routes
from peft_bsr.engine.runner import BlockRouter, attach_router, detach_router
from peft_bsr.engine.verify import verify_plan

__all__ = [
    "BlockPlan",
    "BlockRouter",
    "Mode",
    "Plan",
    "ReduceAt",
    "Reduction",
    "attach_router",
    "detach_router",
    "record_routes",
    "verify_plan",
]
