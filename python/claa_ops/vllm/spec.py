"""What the caches of the deeper layers, and of parked hidden states, are like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from claa_ops.selection import Budget
from claa_ops.vllm.groups import HiddenPages
from claa_ops.vllm.settings import cached_tokens, kept_tokens


# Not a FullAttentionSpec: its merge accepts any subclass, and the deeper layers would end up in
# the group of the others; so would hidden states.
@dataclass(frozen=True, kw_only=True)
class _PromptSpec(AttentionSpec):
    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """That of the longest request, of which nothing is saved: of its prompt, or its answer."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class _PruningSpec(_PromptSpec):
    budget: Budget
    window: int
    min_prompt: int = 0

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt go deeper, if its request asks for nothing."""
        return kept_tokens(prompt, self.budget, self.window, self.min_prompt)


@dataclass(frozen=True, kw_only=True)
class KeptAttentionSpec(_PruningSpec):
    """Full attention over the kept tokens of the prompt and all tokens after it.

    Attributes:
        budget: how many tokens of a prompt are kept.
        window: the last tokens of a prompt, which always are.
        min_prompt: shorter prompts are kept whole.
    """

    @classmethod
    def of(
        cls, spec: AttentionSpec, budget: Budget, window: int, min_prompt: int = 0
    ) -> KeptAttentionSpec:
        """The same layer's cache behind a selection."""
        return cls(**_shared(spec), budget=budget, window=window, min_prompt=min_prompt)

    def entries(self, tokens: int, prompt: int, kept: int | None = None) -> int:
        """Entries needed once ``tokens`` are computed: the kept ones' from the first chunk on."""
        kept = self.kept(prompt) if kept is None else kept
        return kept + max(0, tokens - prompt)


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(_PruningSpec):
    """Full attention over the whole prompt; once it is over, over what is kept of its cache.

    A request's block table has the prompt's blocks, which others may share, and behind them those
    of the kept entries and of the tokens after the prompt. The former are given back then.

    Attributes:
        budget, window, min_prompt: see :class:`KeptAttentionSpec`.
        keep_kv: how many tokens of a prompt the cache keeps.
        allocated: tokens of a block as the scheduler counts them; kernels may see smaller ones.
    """

    keep_kv: Budget
    allocated: int

    @classmethod
    def of(
        cls, spec: AttentionSpec, budget: Budget, window: int, min_prompt: int, keep_kv: Budget
    ) -> CompressedAttentionSpec:
        """The same layer's cache before a selection."""
        own: dict[str, Any] = dict(budget=budget, window=window, min_prompt=min_prompt)
        return cls(**_shared(spec), **own, keep_kv=keep_kv, allocated=spec.block_size)

    def cached(self, prompt: int, kept: int | None = None) -> int:
        """How many tokens of a prompt the cache keeps, of which ``kept`` go deeper."""
        kept = self.kept(prompt) if kept is None else kept
        return cached_tokens(prompt, kept, self.keep_kv, self.window)

    def own_entries(self, tokens: int, prompt: int, kept: int | None = None) -> int:
        """Entries behind the prompt's blocks once ``tokens`` are computed; 0 if all are kept."""
        cached = self.cached(prompt, kept)
        return 0 if tokens < prompt or cached == prompt else cached + tokens - prompt

    def blocks(self, tokens: int, prompt: int, kept: int | None = None) -> int:
        """Blocks of the table once ``tokens`` are computed, those given back included."""
        own = self.own_entries(tokens, prompt, kept)
        whole = prompt if own else tokens
        return cdiv(whole, self.block_size) + cdiv(own, self.block_size)

    def first_own_block(self, prompts: Any) -> Any:
        """Where in the table, as kernels see it, the blocks behind the prompt's begin."""
        return cdiv(prompts, self.allocated) * (self.allocated // self.block_size)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """The width of block tables: a prompt, and nearly all of it once more."""
        return 2 * cdiv(max_len, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """That of the longest prompt when it ends: a request may ask to keep nearly all of it."""
        return 2 * super().max_memory_usage_bytes(vllm_config)


@dataclass(frozen=True, kw_only=True)
class HiddenSpec(_PromptSpec):
    """A slice of the hidden states of a prompt, in a page of the size of the other layers'.

    To vLLM it is one head whose key and value are half a slice each.

    Attributes:
        window: the last tokens of a prompt, which are computed whatever is cached: the method needs
            their queries.
    """

    window: int

    @classmethod
    def of(cls, spec: AttentionSpec, *, width: int, layers: int, window: int) -> HiddenSpec:
        """Laid out in the pages of a layer's cache, as ``HiddenPages.fit`` says.

        Raises:
            ValueError: the pages have more than keys and values, or a hidden state does not fit.
        """
        entry = 2 * spec.num_kv_heads * spec.head_size
        pages = HiddenPages.fit(width=width, layers=layers, block_size=spec.block_size, entry=entry)
        made = cls(
            block_size=pages.tokens,
            num_kv_heads=1,
            head_size=pages.columns // 2,
            dtype=spec.dtype,
            window=window,
        )
        if made.page_size_bytes != spec.page_size_bytes:
            raise ValueError(
                f"claa: a page must hold {spec.block_size} keys and values of {entry} elements in "
                f"all and nothing else, got {spec.page_size_bytes} bytes"
            )
        return made


def _shared(spec: AttentionSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}


def register() -> None:
    """Tell vLLM which manager serves which spec."""
    from claa_ops.vllm.managers import CompressedManager, HiddenManager, KeptAttentionManager

    # vLLM adds its own specs only to an empty registry: they must be in it before ours.
    KVCacheSpecRegistry._ensure_registered()
    pairs: list[tuple[type[_PromptSpec], type]] = [
        (KeptAttentionSpec, KeptAttentionManager),
        (CompressedAttentionSpec, CompressedManager),
        (HiddenSpec, HiddenManager),
    ]
    for spec, manager in pairs:
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
