"""What the caches of the deeper layers, and of parked hidden states, are like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from claa_ops.selection import Budget
from claa_ops.vllm.groups import HiddenPages
from claa_ops.vllm.settings import kept_tokens


# Not a FullAttentionSpec: its merge accepts any subclass, and the deeper layers would end up in
# the group of the others; so would hidden states.
@dataclass(frozen=True, kw_only=True)
class _PromptSpec(AttentionSpec):
    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """That of the longest request, of which nothing is saved: of its prompt, or its answer."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class KeptAttentionSpec(_PromptSpec):
    """Full attention over the kept tokens of the prompt and all tokens after it.

    Attributes:
        budget: how many tokens of a prompt are kept.
        window: the last tokens of a prompt, which always are.
        min_prompt: shorter prompts are kept whole.
    """

    budget: Budget
    window: int
    min_prompt: int = 0

    @classmethod
    def of(
        cls, spec: AttentionSpec, budget: Budget, window: int, min_prompt: int = 0
    ) -> KeptAttentionSpec:
        """The same layer's cache behind a selection."""
        shared = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
        return cls(**shared, budget=budget, window=window, min_prompt=min_prompt)

    def kept(self, prompt: int) -> int:
        """How many tokens of a prompt are kept, if its request asks for nothing."""
        return kept_tokens(prompt, self.budget, self.window, self.min_prompt)

    def entries(self, tokens: int, prompt: int, kept: int | None = None) -> int:
        """Entries needed once ``tokens`` are computed: the kept ones' from the first chunk on."""
        kept = self.kept(prompt) if kept is None else kept
        return kept + max(0, tokens - prompt)


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


def register() -> None:
    """Tell vLLM which manager serves which spec."""
    from claa_ops.vllm.managers import HiddenManager, KeptAttentionManager

    # vLLM adds its own specs only to an empty registry: they must be in it before ours.
    KVCacheSpecRegistry._ensure_registered()
    for spec, manager in ((KeptAttentionSpec, KeptAttentionManager), (HiddenSpec, HiddenManager)):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
