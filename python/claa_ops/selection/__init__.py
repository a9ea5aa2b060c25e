"""What a method may see of a prefill and decide about it: torch alone, and no model library."""

from claa_ops.selection.answer import Answer, Reader
from claa_ops.selection.budget import Budget, Sizes
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method, Preparation
from claa_ops.selection.packed import PackedPrefill, begin_packed
from claa_ops.selection.state import PrefillState, Turn, begin
from claa_ops.selection.taken import TakenUp
from claa_ops.selection.work import Work

__all__ = [
    "Answer",
    "Budget",
    "Layer",
    "Method",
    "PackedPrefill",
    "PrefillState",
    "Preparation",
    "Reader",
    "Sizes",
    "TakenUp",
    "Turn",
    "Work",
    "begin",
    "begin_packed",
]
