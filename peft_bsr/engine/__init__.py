"""Plan, route and the runner that makes a model's blocks follow them."""

from peft_bsr.engine.plan import BlockPlan, Plan, Reduction
from peft_bsr.engine.route import Route, RouteCarrier, record_routes
from peft_bsr.engine.runner import BlockRouter, attach_router, detach_router
from peft_bsr.engine.verify import verify_plan

__all__ = [
    "BlockPlan",
    "BlockRouter",
    "Plan",
    "Reduction",
    "Route",
    "RouteCarrier",
    "attach_router",
    "detach_router",
    "record_routes",
    "verify_plan",
]
