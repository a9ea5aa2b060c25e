"""How many prompts fit the cache: vLLM's own line at start counts each layer as if it kept all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from claa_ops.vllm.spec import CompressedAttentionSpec, HiddenSpec, KeptAttentionSpec


@dataclass(frozen=True)
class Capacity:
    """What a prompt of a certain length, and maybe its answer, take of the cache.

    Attributes:
        prompt: its tokens.
        blocks: they hold so many once the selection has run.
        parked: and so many more until then, for hidden states and for caches that are compressed.
        total: blocks that there are.
        padding: the share of the held pages that no layer writes.
        plain: blocks that a model without selection would hold, if they were of the same size.
    """

    prompt: int
    blocks: int
    parked: int
    total: int
    padding: float
    plain: float

    @classmethod
    def of(cls, config: Any, prompt: int, new: int = 0) -> Capacity:
        """Of a prompt of so many tokens and ``new`` of an answer, with vLLM's ``KVCacheConfig``."""
        all_tokens = prompt + new
        blocks = parked = pages = layers = 0
        size = max(len(group.layer_names) for group in config.kv_cache_groups)
        for group in config.kv_cache_groups:
            spec, count = group.kv_cache_spec, len(group.layer_names)
            if isinstance(spec, HiddenSpec):
                parked += -(-prompt // spec.block_size)
                continue
            tokens = all_tokens
            if isinstance(spec, KeptAttentionSpec):
                tokens = spec.entries(all_tokens, prompt)
            elif isinstance(spec, CompressedAttentionSpec):
                if own := spec.own_entries(all_tokens, prompt):
                    tokens = own
                    parked += -(-prompt // spec.block_size)
            held = -(-tokens // spec.block_size)
            blocks += held
            pages += held * count
            layers += count
            whole = -(-all_tokens // spec.block_size)
        return cls(
            prompt=prompt,
            blocks=blocks,
            parked=parked,
            total=config.num_blocks - 1,  # vLLM keeps one that nobody gets
            padding=1 - pages / (blocks * size),
            plain=whole * layers / size,
        )

    @property
    def at_once(self) -> float:
        """So many such prompts fit, once the selection has run."""
        return self.total / self.blocks

    @property
    def gain(self) -> float:
        """How many times those of a model without selection."""
        return self.plain / self.blocks

    def __str__(self) -> str:
        return (
            f"claa: a prompt of {self.prompt:,} tokens holds {self.blocks:,} of {self.total:,} "
            f"blocks, {self.at_once:.1f} fit at once, {self.gain:.2f} times as many as without "
            f"selection; {self.parked:,} blocks more until its end is read; padding takes "
            f"{self.padding:.0%} of what is held"
        )
