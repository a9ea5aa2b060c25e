"""What the caches of the deeper layers and of parked hidden states are like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from claa_ops.vllm.groups import HiddenPages


def kept_tokens(prompt: int, count: int, per: int, window: int) -> int:
    """Tokens of a prompt that the deeper layers see: Budget.tokens, never more than all."""
    if prompt <= window:
        return prompt
    return min(prompt, max(window, prompt * count // per if per else count))


# Not a FullAttentionSpec: FullAttentionSpec.merge accepts any subclass, and the deeper layers would
# end up in the group of the others. The same goes for hidden states.
@dataclass(frozen=True, kw_only=True)
class KeptAttentionSpec(AttentionSpec):
    """Full attention over the kept tokens of the prompt and all tokens after it."""

    count: int
    per: int
    window: int

    @classmethod
    def of(cls, spec: AttentionSpec, count: int, per: int, window: int) -> KeptAttentionSpec:
        shared = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec)}
        return cls(**shared, count=count, per=per, window=window)

    def slots(self, tokens: int, prompt: int) -> int:
        """Slots needed once ``tokens`` are computed. The kept tokens' from the first chunk on."""
        return kept_tokens(prompt, self.count, self.per, self.window) + max(0, tokens - prompt)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        # A short prompt with a long answer: nothing is saved. (Honest, and pessimistic.)
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class HiddenSpec(AttentionSpec):
    """A slice of the hidden states of a prompt, in a page of the size of the other layers'.

    To vLLM it is one head whose key and value are half a slice each.

    Attributes:
        window: the last tokens of a prompt that have to be computed, whatever is cached: the
            method needs their queries.
    """

    window: int

    @classmethod
    def of(cls, spec: AttentionSpec, *, width: int, layers: int, window: int) -> HiddenSpec:
        """As ``HiddenPages.fit`` lays them out in the pages of ``spec``."""
        entry = 2 * spec.num_kv_heads * spec.head_size
        pages = HiddenPages.fit(
            width=width, layers=layers, block_size=spec.block_size, entry=entry
        )
        made = cls(
            block_size=pages.tokens,
            num_kv_heads=1,
            head_size=pages.columns // 2,
            dtype=spec.dtype,
            window=window,
        )
        if made.page_size_bytes != spec.page_size_bytes:
            raise ValueError(
                f"claa: pages must hold {spec.num_kv_heads} heads' keys and values of "
                f"{spec.head_size} elements and nothing else, got pages of "
                f"{spec.page_size_bytes} bytes"
            )
        return made

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


def register() -> None:
    """Tell vLLM which manager serves which spec."""
    from claa_ops.vllm.managers import HiddenManager, KeptAttentionManager

    # Not before vLLM's own: _ensure_registered looks only whether the registry is empty, and would
    # leave the built-in specs out for good.
    KVCacheSpecRegistry._ensure_registered()
    for spec, manager in ((KeptAttentionSpec, KeptAttentionManager), (HiddenSpec, HiddenManager)):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
