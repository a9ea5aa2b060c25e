"""What a method answers and saves on a prompt, measured against full prefill."""

from claa_ops.evaluate.compare import Comparison, Run, compare
from claa_ops.evaluate.cost import PrefillCost, prefill_cost

__all__ = ["Comparison", "PrefillCost", "Run", "compare", "prefill_cost"]
