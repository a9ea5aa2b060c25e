"""Scheduler side: the deeper layers own blocks for the kept tokens alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from claa_ops.selection import Budget


# Not a FullAttentionSpec: its merge accepts any subclass, and the deeper layers would end up in
# the group of the others.
@dataclass(frozen=True, kw_only=True)
class KeptAttentionSpec(AttentionSpec):
    """Full attention over the kept tokens of the prompt and all tokens after it.

    Attributes:
        budget: how many tokens of a prompt are kept.
        window: the last tokens of a prompt, which always are.
    """

    budget: Budget
    window: int

    @classmethod
    def of(cls, spec: AttentionSpec, budget: Budget, window: int) -> KeptAttentionSpec:
        """The same layer's cache behind a selection."""
        shared = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
        return cls(**shared, budget=budget, window=window)

    def entries(self, tokens: int, prompt: int) -> int:
        """Entries needed once ``tokens`` are computed: the kept ones' from the first chunk on."""
        kept = min(prompt, self.budget.tokens(prompt, self.window))
        return kept + max(0, tokens - prompt)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """That of a short prompt with a long answer, of which nothing is saved."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class KeptAttentionManager(SingleTypeKVCacheManager):
    """Blocks for what a :class:`KeptAttentionSpec` needs; no request shares one with another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[str, int] = {}

    def remove_skipped_blocks(
        self, request_id: str, computed: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Note the length of the prompt: the one call that tells it, before each allocation."""
        if num_prompt_tokens is not None:
            self.prompts[request_id] = num_prompt_tokens

    def _blocks(self, request_id: str, num_tokens: int) -> int:
        # Unknown only in the admission check before the first allocation.
        prompt = self.prompts.get(request_id, num_tokens)
        return cdiv(self.kv_cache_spec.entries(num_tokens, prompt), self.block_size)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """How many blocks are missing for ``num_tokens``."""
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(0, self._blocks(request_id, num_tokens) - held)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Take the missing blocks from the pool."""
        held = self.req_to_blocks[request_id]
        missing = self._blocks(request_id, num_tokens) - len(held)
        if missing <= 0:
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        held.extend(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The blocks of a request that ends or is preempted."""
        self.prompts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: which tokens are in a block depends on all of the prompt, its end included."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None are shared."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """No hit, so that no group has one: selection needs the states of the whole prompt."""
        none: tuple[list[Any], ...] = tuple([] for _ in kv_cache_group_ids)
        return (none, 0) if _HIT_HAS_LENGTH else none


def _hit_has_length() -> bool:
    """Newer versions return the length of a hit beside its blocks."""
    found = inspect.signature(SingleTypeKVCacheManager.find_longest_cache_hit).return_annotation
    return "int]" in str(found).replace(" ", "").rsplit(",", 1)[-1]


_HIT_HAS_LENGTH = _hit_has_length()


def register() -> None:
    """Tell vLLM which manager serves the spec."""
    # vLLM adds its own specs only to an empty registry: they must be in it before ours.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        KeptAttentionSpec, KeptAttentionManager, uniform_type_base_spec=KeptAttentionSpec
    )
