"""One module per ranking system: which prompt tokens it keeps, where, and how many."""

from claa_ops.methods.base import Method
from claa_ops.methods.claa import CLAA
from claa_ops.methods.full import FullKV

__all__ = ["CLAA", "FullKV", "Method"]
