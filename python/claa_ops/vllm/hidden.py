"""Worker side: the hidden states after the selection layer, in pages of vLLM's cache.

A prompt's hidden states are parked here chunk by chunk, until its end is there and the selection
reads those of the kept tokens; they stay, as cached blocks do, for prompts that begin alike.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
)

from claa_ops.vllm.groups import Groups
from claa_ops.vllm.spec import HiddenSpec


class HiddenMetadata:
    """Of a step: where vLLM puts each token of the batch, and the blocks of each request."""

    def __init__(self, slots: Tensor, block_table: Tensor) -> None:
        self.slots = slots  # [tokens], int64
        self.block_table = block_table  # [requests, blocks], int32


class HiddenBuilder(AttentionMetadataBuilder[HiddenMetadata]):
    """Passes on vLLM's slots and block table."""

    # A captured step has no prompt, and neither reads nor writes hidden states.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> HiddenMetadata:
        """Called by keyword in 0.25: the names are part of the interface."""
        common = common_attn_metadata
        return HiddenMetadata(common.slot_mapping, common.block_table_tensor)


class HiddenBackend(AttentionBackend):
    """Pages without attention."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CLAA_HIDDEN"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("claa: hidden states have pages, but no attention")

    @staticmethod
    def get_builder_cls() -> type[HiddenBuilder]:
        return HiddenBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[Any]:
        return [MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The form that 0.32 gives all pages by itself."""
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)


class HiddenLayer(AttentionLayerBase):
    """One slice of the hidden states: to vLLM a layer with a cache."""

    def __init__(self, spec_of: Any) -> None:
        self._spec_of = spec_of
        self.kv_cache = torch.tensor([])  # until vLLM binds it

    def get_attn_backend(self) -> type[AttentionBackend]:
        return HiddenBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> HiddenSpec:
        return self._spec_of(vllm_config)


class ParkedHidden:
    """The hidden states after the selection layer of all prompts under way, and of cached ones.

    Args:
        attention: a layer of the front, whose pages these are made to fit.
        groups: the model's layers before and after the selection.
        width: elements of a hidden state.
        window: the last tokens of a prompt whose queries the method needs.
        prefix: begins the layers' names.
    """

    def __init__(
        self,
        attention: Any,
        *,
        groups: Groups,
        width: int,
        window: int,
        prefix: str,
        vllm_config: VllmConfig,
    ) -> None:
        def spec_of(config: VllmConfig) -> HiddenSpec:
            pages = attention.get_kv_cache_spec(config)
            return HiddenSpec.of(pages, width=width, layers=groups.size, window=window)

        self.width = width
        self.layers = [HiddenLayer(spec_of) for _ in range(groups.size)]
        self.names = [f"{prefix}.parked_hidden.{index}" for index in range(groups.size)]
        context = vllm_config.compilation_config.static_forward_context
        context.update(zip(self.names, self.layers, strict=True))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.layers[0].kv_cache.shape[2]

    def write(self, hidden: Tensor, slots: Tensor) -> None:
        """Put ``hidden``, ``[n, width]``, at ``slots``, ``[n]``, int64."""
        block, place = slots // self.block_size, slots % self.block_size
        for pages, columns in self._slices():
            part = hidden[:, columns]
            pages[block, place, : part.shape[1]] = part

    def read(self, slots: Tensor) -> Tensor:
        """The hidden states at ``slots``: ``[n, width]``."""
        block, place = slots // self.block_size, slots % self.block_size
        parts = [
            pages[block, place, : columns.stop - columns.start] for pages, columns in self._slices()
        ]
        return torch.cat(parts, dim=1)

    def slots(self, block_table: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Where the tokens at ``places`` of the requests in ``rows`` of the table are: ``[n]``."""
        blocks = block_table[rows, places // self.block_size].long()
        return blocks * self.block_size + places % self.block_size

    def _slices(self) -> Any:
        """For each layer that holds some of the width: ``[blocks, tokens, columns]``, which."""
        for index, layer in enumerate(self.layers):
            pages = layer.kv_cache[:, 0]
            first = index * pages.shape[2]
            if first < self.width:
                yield pages, slice(first, min(first + pages.shape[2], self.width))
