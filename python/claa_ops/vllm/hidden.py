"""Worker side: the hidden states after the selection layer, in pages of vLLM's cache.

A prompt's hidden states are parked here chunk by chunk, until its end is there and the selection
reads those of the kept tokens; they stay, as cached blocks do, for prompts that begin alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from claa_ops.vllm.groups import Groups
from claa_ops.vllm.spec import HiddenSpec


class HiddenBuilder(AttentionMetadataBuilder[Any]):
    """Shows vLLM's slots and block table of a step to those who park and read."""

    # A captured step has no prompt, and neither reads nor writes hidden states.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, HiddenLayer, layer_names)
        self.parked = layers[layer_names[0]].parked

    # Called by keyword in some versions: the names are part of the interface.
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> None:
        """No metadata: no layer runs on them."""
        self.parked.slot_mapping = common_attn_metadata.slot_mapping
        self.parked.block_table = common_attn_metadata.block_table_tensor


class HiddenBackend(AttentionBackend):
    """Pages without attention."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """In logs."""
        return "CLAA_HIDDEN"

    @staticmethod
    def get_impl_cls() -> Any:
        """Nobody asks."""
        raise NotImplementedError("claa: hidden states have pages, but no attention")

    @staticmethod
    def get_builder_cls() -> type[HiddenBuilder]:
        """Asked by the runner."""
        return HiddenBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[Any]:
        """Any."""
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
    """A slice of the hidden states: to vLLM a layer with a cache."""

    def __init__(self, parked: ParkedHidden) -> None:
        self.parked = parked
        self.kv_cache = torch.tensor([])  # until vLLM binds it

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Pages alone."""
        return HiddenBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> HiddenSpec:
        """Of all slices the same."""
        return self.parked.spec(vllm_config)


class ParkedHidden:
    """The hidden states behind the selection layer, of prompts under way and of cached ones.

    Args:
        attention: a layer of the front, whose pages these are made to fit.
        groups: the model's layers before and after the selection.
        width: C, of a hidden state.
        window: the last tokens of a prompt whose queries the method needs.
        prefix: begins the layers' names.
        vllm_config: of the engine.

    Attributes:
        slot_mapping: ``[tokens]``, int64: where a step's tokens go, right for those of prompts.
        block_table: ``[rows, blocks]``, int32: of a step.
    """

    slot_mapping: Tensor
    block_table: Tensor

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
        self._attention, self._window = attention, window
        self.width = width
        # As many as a group has, so that vLLM neither splits nor pads it.
        self.layers = [HiddenLayer(self) for _ in range(groups.size)]
        names = [f"{prefix}.claa_hidden.{index}".lstrip(".") for index in range(groups.size)]
        context = vllm_config.compilation_config.static_forward_context
        context.update(zip(names, self.layers, strict=True))

    def spec(self, vllm_config: VllmConfig) -> HiddenSpec:
        """What each of the layers has in its pages."""
        pages = self._attention.get_kv_cache_spec(vllm_config)
        return HiddenSpec.of(pages, width=self.width, layers=len(self.layers), window=self._window)

    def write(self, hidden: Tensor, tokens: Tensor) -> None:
        """Put ``hidden``, ``[n, C]``, of some ``tokens``, ``[n]``, of the batch into the pages."""
        slots = self.slot_mapping[tokens]
        block, place = slots // self.block_size, slots % self.block_size
        for pages, columns in self._slices():
            pages[block, place, : columns.stop - columns.start] = hidden[:, columns]

    def read(self, row: int, tokens: Tensor) -> Tensor:
        """``[n, C]``: of some ``tokens``, ``[n]``, of the prompt of one row of the batch."""
        block = self.block_table[row, tokens // self.block_size].long()
        place = tokens % self.block_size
        slices = self._slices()
        parts = [pages[block, place, : part.stop - part.start] for pages, part in slices]
        return torch.cat(parts, dim=1)

    @property
    def block_size(self) -> int:
        """How many hidden states a block has."""
        return self.layers[0].kv_cache.shape[2]

    def _slices(self) -> Iterator[tuple[Tensor, slice]]:
        """Of each layer that is needed: its pages, ``[blocks, tokens, columns]``, and of which."""
        for index, layer in enumerate(self.layers):
            pages = layer.kv_cache[:, 0]
            first = index * pages.shape[2]
            if first < self.width:
                yield pages, slice(first, min(first + pages.shape[2], self.width))
