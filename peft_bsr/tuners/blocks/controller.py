"""The controller of methods that train blocks."""

from __future__ import annotations

from peft_bsr.compat.peft_api import check_adapters_to_merge
from peft_bsr.tuners.base.layer import AdapterController


class MergeableController(AdapterController):
    """A block controller whose adapters can be merged. Token reduction stays active after a merge.

    Args:
        index, spec, context, rule: See `BlockController`.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the token reduction of merged adapters active. It is not in the weights, so outputs do not change."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        self.merged_adapters[:] = names or self.merged_adapters

    def unmerge(self) -> None:
        """See `merge`."""
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable adapters."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


__all__ = ["MergeableController"]
