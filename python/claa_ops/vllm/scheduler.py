"""What vLLM does not tell its cache managers: the request, before they count its blocks.

Two methods of ``KVCacheManager`` are wrapped: ``get_computed_blocks``, which every scheduler calls
for a request without computed tokens, new or preempted; and the constructor, to say what fits.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_manager import KVCacheManager

from claa_ops.vllm.capacity import Capacity
from claa_ops.vllm.managers import HiddenManager, PromptManager

logger = init_logger("vllm.claa_ops")  # a child of vLLM's, which prints


def register() -> None:
    """Wrap the methods, once in a process."""
    if not hasattr(KVCacheManager, "claa"):
        KVCacheManager.claa = True
        _wrap_hits(KVCacheManager)
        _wrap_init(KVCacheManager)


def longest_hit(managers: Any, prompt: int) -> int | None:
    """How much of a prompt may come from the cache: the window's queries have to be computed.

    None if the model is not one of ours.
    """
    for manager in managers:
        if isinstance(manager, HiddenManager):
            hit = max(0, prompt - manager.kv_cache_spec.window)
            return round_down(hit, manager.scheduler_block_size)
    return None


def _wrap_hits(manager: Any) -> None:
    plain = manager.get_computed_blocks

    @functools.wraps(plain)
    def get_computed_blocks(self: Any, request: Any) -> Any:
        managers = self.coordinator.single_type_managers
        for each in managers:
            if isinstance(each, PromptManager):
                each.note(request)
        found, length, *rest = plain(self, request)
        limit = longest_hit(managers, request.num_prompt_tokens)
        if limit is None or length <= limit:
            return (found, length, *rest)
        blocks = (
            list(group[: limit // each.block_size])
            for group, each in zip(found.blocks, managers, strict=True)
        )
        return (self.create_kv_cache_blocks(tuple(blocks)), limit, *rest)

    manager.get_computed_blocks = get_computed_blocks


def _wrap_init(manager: Any) -> None:
    plain = manager.__init__

    @functools.wraps(plain)
    def __init__(
        self: Any, kv_cache_config: Any, max_model_len: int, *args: Any, **kwargs: Any
    ) -> None:
        plain(self, kv_cache_config, max_model_len, *args, **kwargs)
        if any(isinstance(each, HiddenManager) for each in self.coordinator.single_type_managers):
            logger.info("%s", Capacity.of(kv_cache_config, max_model_len))

    manager.__init__ = __init__
