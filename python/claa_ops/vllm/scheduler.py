"""What vLLM does not tell its cache managers: the request, before they count its blocks.

Two methods of ``KVCacheManager`` are wrapped: ``get_computed_blocks``, which every scheduler calls
for a request without computed tokens, new or preempted; and the constructor, to say what fits. Of
the scheduler its constructor is wrapped: with compressed caches a step ends where a prompt does.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from claa_ops.vllm.capacity import Capacity
from claa_ops.vllm.managers import CompressedManager, HiddenManager, PromptManager

logger = init_logger("vllm.claa_ops")  # a child of vLLM's, which prints


def register() -> None:
    """Wrap the methods, once in a process."""
    if not hasattr(KVCacheManager, "claa"):
        KVCacheManager.claa = True
        _wrap_hits(KVCacheManager)
        _wrap_init(KVCacheManager)
        _wrap_scheduler(Scheduler)


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
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        managers = self.coordinator.single_type_managers
        for each in managers:
            if isinstance(each, PromptManager):
                each.note(request)
        found, length, *rest = plain(self, request, *args, **kwargs)
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


def _wrap_scheduler(scheduler: Any) -> None:
    """With compressed caches, compute a preempted request's prompt and its answer in two steps.

    Tokens of the answer see the compressed caches, when they are computed anew as when they were
    first. vLLM has a place for this: it asks where to split a prefill of a model with Mamba layers.
    """
    plain = scheduler.__init__

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if any(isinstance(each, CompressedManager) for each in managers):
            self.need_mamba_block_aligned_split = True
            self._mamba_block_aligned_split = to_the_prompts_end

    scheduler.__init__ = __init__


def to_the_prompts_end(request: Any, num_new_tokens: int, *hits: int) -> int:
    """How many of a request's new tokens may be in one step.

    Args:
        request: vLLM's.
        num_new_tokens: as many as there is room for.
        hits: tokens that were found in caches, and are not among the request's computed ones.
    """
    left = request.num_prompt_tokens - request.num_computed_tokens - sum(hits)
    return min(num_new_tokens, left) if left > 0 else num_new_tokens
