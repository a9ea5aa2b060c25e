"""One module for each method: which prompt tokens it keeps, where, and how many."""

from claa_ops.methods.asl import ASL
from claa_ops.methods.claa import CLAA
from claa_ops.methods.coarse import Coarse
from claa_ops.methods.controls import FastKVDeferral, Random, SinksRandom
from claa_ops.methods.fastkv import FastKV
from claa_ops.methods.full import FullKV
from claa_ops.methods.gemfilter import GemFilter
from claa_ops.methods.hops import Hops
from claa_ops.methods.lazyllm import LazyLLM
from claa_ops.methods.oracle import Oracle
from claa_ops.methods.peak import Peak
from claa_ops.methods.promptdistill import PromptDistill
from claa_ops.methods.pruning import Pruning
from claa_ops.methods.pyramidinfer import PyramidInfer
from claa_ops.methods.pyramidkv import PyramidKV
from claa_ops.methods.registry import METHODS, find_method, make_method, register
from claa_ops.methods.selective import SelectiveContext
from claa_ops.methods.snapkv import SnapKV
from claa_ops.methods.speculative import SpeculativePrefill
from claa_ops.methods.streaming import StreamingLLM
from claa_ops.methods.uniprefill import UniPrefill
from claa_ops.selection.method import Method

__all__ = [
    "ASL",
    "CLAA",
    "METHODS",
    "Coarse",
    "FastKV",
    "FastKVDeferral",
    "FullKV",
    "GemFilter",
    "Hops",
    "LazyLLM",
    "Method",
    "Oracle",
    "Peak",
    "PromptDistill",
    "Pruning",
    "PyramidInfer",
    "PyramidKV",
    "Random",
    "SelectiveContext",
    "SinksRandom",
    "SnapKV",
    "SpeculativePrefill",
    "StreamingLLM",
    "UniPrefill",
    "find_method",
    "make_method",
    "register",
]
