"""The router of methods that train blocks."""

from __future__ import annotations

from peft_bsr.compat.peft_api import check_adapters_to_merge
from peft_bsr.tuners.base.layer import AdapterRouter


class MergeableRouter(AdapterRouter):
    """A block's router, whose adapters may be merged. Not a weight: token reduction stays in force when weights merge.

    Args:
        index, column, context, rule: See `BlockRouter`.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Token reduction is not in the weights: a merged adapter goes on reducing, its outputs do not change."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        self.merged_adapters[:] = names or self.merged_adapters

    def unmerge(self) -> None:
        """See `merge`."""
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


__all__ = ["MergeableRouter"]
