"""Scheduler side: which blocks layers before and behind the selection, and hidden states, hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from vllm.utils.math_utils import cdiv, round_down
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from claa_ops.vllm.requests import kept_of


class PromptManager(SingleTypeKVCacheManager):
    """A manager that has to know a request's prompt: ``scheduler.py`` notes it beforehand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[str, int] = {}

    def note(self, request: Any) -> None:
        """Remember a request that is about to be scheduled, until its blocks are freed."""
        self.prompts[request.request_id] = request.num_prompt_tokens

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The blocks of a request that ends or is preempted."""
        self.prompts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: these layers' attention, if any, is each request's own."""
        return 0


class PruningManager(PromptManager):
    """A manager that has to know also how many tokens of the prompt go deeper."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, int | None] = {}

    def note(self, request: Any) -> None:
        """Remember too how many tokens it keeps, which it may have asked for."""
        super().note(request)
        self.kept[request.request_id] = kept_of(request.sampling_params)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The blocks of a request that ends or is preempted."""
        self.kept.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class KeptAttentionManager(PruningManager):
    """Blocks for what a KeptAttentionSpec needs; nothing of it is shared between requests."""

    def _missing(self, request_id: str, num_tokens: int) -> int:
        prompt, kept = self.prompts[request_id], self.kept[request_id]
        entries = self.kv_cache_spec.entries(num_tokens, prompt, kept)
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(0, cdiv(entries, self.block_size) - held)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """How many blocks are missing for ``num_tokens``."""
        return self._missing(request_id, num_tokens)

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: of a prefix hit these layers have no block."""

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Take the missing blocks from the pool."""
        blocks = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: which tokens are in a block depends on all of the prompt, its end included."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As long as the other groups like: of the prefix these layers need its hidden states."""
        if _HIT_HAS_LENGTH:
            return tuple([] for _ in kv_cache_group_ids), max_length
        blocks = max_length // kv_cache_spec.block_size
        return tuple([block_pool.null_block] * blocks for _ in kv_cache_group_ids)


class SharedManager(PromptManager):
    """Blocks of a prompt that depend on the prefix alone, until the prompt is over.

    They are hashed and shared like the blocks of a layer with full attention; then they go to the
    cache's least recently used ones.
    """

    def _slots(self, request_id: str, num_tokens: int) -> int:
        """How many entries the block table has for ``num_tokens``: the prompt's alone."""
        return min(num_tokens, self.prompts[request_id])

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """How many blocks are missing for ``num_tokens``."""
        slots = self._slots(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, slots, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Take the missing blocks from the pool."""
        slots = self._slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, slots, slots)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let other requests hit the full blocks of the prompt."""
        # No hit is longer; and what lies behind may have been freed when vLLM gets to it.
        longest = round_down(request.num_prompt_tokens, self.scheduler_block_size)
        super().cache_blocks(request, min(num_tokens, longest), *args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, computed: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of a prompt that is over."""
        # Computed, so the step that selected has run, or runs before whoever gets the blocks.
        prompt = self.prompts.get(request_id)
        if prompt is not None and computed >= prompt:
            self._remove_blocks_in_range(request_id, 0, cdiv(prompt, self.block_size))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The longest run of cached blocks from the start."""
        size = kv_cache_spec.block_size
        found: tuple[list[Any], ...] = tuple([] for _ in kv_cache_group_ids)
        hashes = _hashes(block_hashes, block_pool, size)
        for block_hash in islice(hashes, round_down(max_length, alignment_tokens) // size):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:
                break
            for blocks, block in zip(found, cached, strict=True):
                blocks.append(block)
        length = round_down(len(found[0]) * size, alignment_tokens)
        for blocks in found:
            del blocks[length // size :]
        return (found, length) if _HIT_HAS_LENGTH else found


class HiddenManager(SharedManager):
    """Blocks for the hidden states of a prompt, until the selection has read them."""


class CompressedManager(SharedManager, PruningManager):
    """Blocks for what a CompressedAttentionSpec needs.

    Those of the prompt are shared; behind them a request has its own for what is kept of the
    prompt and for all tokens after it. A request that keeps all holds the prompt's to its end.
    """

    def _slots(self, request_id: str, num_tokens: int) -> int:
        """Entries of whole blocks: of the prompt's, and once it ends of those behind."""
        prompt, kept = self.prompts[request_id], self.kept[request_id]
        return self.kv_cache_spec.blocks(num_tokens, prompt, kept) * self.block_size

    def remove_skipped_blocks(
        self, request_id: str, computed: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of a prompt that is over, if what is kept of it was copied."""
        prompt = self.prompts.get(request_id)
        if prompt is not None and self.kv_cache_spec.own_entries(
            computed, prompt, self.kept[request_id]
        ):
            super().remove_skipped_blocks(request_id, computed, num_prompt_tokens)


def _hit_has_length() -> bool:
    find = SingleTypeKVCacheManager.find_longest_cache_hit
    annotation = str(inspect.signature(find).return_annotation).replace(" ", "")
    return annotation.endswith("int]")


# vLLM 0.32 asks for the length of a hit, and gives hashes of the smallest block; 0.25 neither.
_HIT_HAS_LENGTH = _hit_has_length()


def _hashes(block_hashes: Any, block_pool: Any, block_size: int) -> Iterable[Any]:
    if not _HIT_HAS_LENGTH or block_size == block_pool.hash_block_size:
        return block_hashes
    from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize

    return BlockHashListWithBlockSize(block_hashes, block_pool.hash_block_size, block_size)
