"""What vLLM does not tell its cache managers: the request, before they count its blocks.

One wrapped method, ``KVCacheManager.get_computed_blocks``, which every scheduler calls for a request
without computed tokens: a new one, or one that was preempted.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_manager import KVCacheManager

from claa_ops.vllm.managers import HiddenManager, PromptManager


def register() -> None:
    """Wrap the method, once in a process."""
    plain = KVCacheManager.get_computed_blocks
    if hasattr(plain, "claa"):
        return

    @functools.wraps(plain)
    def get_computed_blocks(self: Any, request: Any) -> Any:
        managers = self.coordinator.single_type_managers
        for manager in managers:
            if isinstance(manager, PromptManager):
                manager.note(request)
        found, length, *rest = plain(self, request)
        limit = longest_hit(managers, request.num_prompt_tokens)
        if limit is None or length <= limit:
            return (found, length, *rest)
        blocks = (
            list(group[: limit // manager.block_size])
            for group, manager in zip(found.blocks, managers, strict=True)
        )
        return (self.create_kv_cache_blocks(tuple(blocks)), limit, *rest)

    get_computed_blocks.claa = True  # type: ignore[attr-defined]
    KVCacheManager.get_computed_blocks = get_computed_blocks  # type: ignore[method-assign]


def longest_hit(managers: Any, prompt: int) -> int | None:
    """How much of a prompt may come from the cache: the window's queries have to be computed.

    None if the model is not one of ours.
    """
    for manager in managers:
        if isinstance(manager, HiddenManager):
            hit = max(0, prompt - manager.kv_cache_spec.window)
            return round_down(hit, manager.scheduler_block_size)
    return None
