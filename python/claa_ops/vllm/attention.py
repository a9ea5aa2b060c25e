"""Two thin layers over whatever attention back end vLLM chose."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from claa_ops.vllm.metadata import Buffers, compressed, selected, unchanged
from claa_ops.vllm.pages import View, read, strided, transposed, write
from claa_ops.vllm.plan import Pass, Row
from claa_ops.vllm.runtime import Group, Pages, Runtime
from claa_ops.vllm.spec import CompressedAttentionSpec, KeptAttentionSpec


def deepen(attention: Attention, runtime: Runtime) -> None:
    """A layer behind the selection: its own kind of cache, and metadata of the kept tokens."""
    settings = runtime.settings
    plain = attention.get_kv_cache_spec
    attention.get_kv_cache_spec = lambda config: KeptAttentionSpec.of(
        plain(config), settings.budget, settings.method.window, settings.min_prompt
    )
    attention.claa = runtime
    attention.attn_backend = _kept_backend(attention.attn_backend)


def watch(attention: Attention, layer: int, runtime: Runtime) -> None:
    """A layer that sees all tokens.

    It informs the ranking if the method observes it, and its cache may be compressed.
    """
    settings = runtime.settings
    attention.claa = runtime
    if layer in settings.compressed:
        whole, method = attention.get_kv_cache_spec, settings.method
        attention.get_kv_cache_spec = lambda config: CompressedAttentionSpec.of(
            whole(config),
            settings.budget,
            method.window,
            settings.min_prompt,
            method.cache_budget,
        )
        attention.attn_backend = _compressed_backend(attention.attn_backend)
    else:
        attention.attn_backend = _watched_backend(attention.attn_backend)
    if layer not in settings.observed and layer not in settings.compressed:
        return
    plain = attention.impl.forward

    def forward(
        self: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = plain(module, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        if attn_metadata is not None and runtime.observes:
            pages = _PagesOf(module, kv_cache, runtime)
            # Queries, keys and values are those after rotary embedding and norms, in any model.
            runtime.observe(layer, query, (key, value), pages, self.scale)
        return output

    attention.impl.forward = types.MethodType(forward, attention.impl)


class _PagesOf(Pages):
    """A layer's pages."""

    def __init__(self, attention: Attention, cache: Tensor, runtime: Runtime) -> None:
        self._views = _view(attention)(cache, attention.head_size)
        self._table = runtime.block_tables[attention.layer_name]
        self._first = runtime.own_blocks.get(attention.layer_name)

    def read(self, which: int, row: Row) -> Tensor:
        return read(self._views[which], self._table[row.index], row.prompt)

    def write(self, which: int, row: Row, entries: Tensor) -> None:
        assert self._first is not None  # the layer's cache is compressed
        first = int(self._first[row.index])
        write(self._views[which], self._table[row.index, first:], entries)


def _view(attention: Attention) -> View:
    """How to see the pages of a layer."""
    # On a CPU they depend on the instruction set, which versions note at different places.
    form = getattr(attention, "isa", None) or getattr(attention.impl, "isa", None)
    if form is None:
        return strided
    if form != "vec":
        raise ValueError(
            'claa: on a CPU pages must be of the form "vec", as with dtype float32 and block sizes '
            f"that are multiples of 32, got {form!r}"
        )
    return transposed


class _Watched:
    """What the builders of all layers have in common."""

    # Metadata that were built for one group do not serve another, whose block table differs.
    supports_update_block_table = False
    layer_names: list[str]
    vllm_config: Any

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """A batch in which prompts end is never captured whole: their tokens are selected."""
        least = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return least if least.value < single.value else single

    @property
    def claa(self) -> Runtime:
        if not hasattr(self, "_claa"):
            layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
            self._claa: Runtime = next(iter(layers.values())).claa
        return self._claa


class _Buffered:
    """A builder whose lengths and slots are not the batch's."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.buffers = Buffers.of(vllm_config, device)


@cache
def _watched_backend(base: Any) -> type:
    class WatchedBuilder(_Watched, base.get_builder_cls()):  # type: ignore[misc]
        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
                _view(layer)  # refuses pages that cannot be read before any is written

        # Called by keyword in some versions: the names are part of the interface.
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            for name in self.layer_names:
                self.claa.block_tables[name] = common_attn_metadata.block_table_tensor
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    return subclass_attention_backend("Watched", base, WatchedBuilder)


@cache
def _compressed_backend(base: Any) -> type:
    class CompressedBuilder(_Buffered, _watched_backend(base).get_builder_cls()):  # type: ignore[misc]
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            claa, spec, common = self.claa, self.kv_cache_spec, common_attn_metadata
            plan, first = claa.plan_of(common), None
            if plan is not None:
                first = spec.first_own_block(plan.batch.prompts)
            changed = compressed(common, plan, first, spec.block_size, self.buffers)
            now = super().build(0, changed, fast_build), changed.slot_mapping
            claa.fronts.append(Group(self.layer_names, now=now))
            for name in self.layer_names:  # of whole prompts, and of what is kept of them
                claa.block_tables[name] = common.block_table_tensor
                claa.own_blocks[name] = first
            return now[0]

    return subclass_attention_backend("Compressed", base, CompressedBuilder)


@cache
def _kept_backend(base: Any) -> type:
    class KeptBuilder(_Buffered, _Watched, base.get_builder_cls()):  # type: ignore[misc]
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            plan = self.claa.plan_of(common_attn_metadata)
            block_size = self.kv_cache_spec.block_size
            build = super().build
            if plan is not None and not plan.same:
                # Built when its tokens are about to run: what a builder holds serves one pass.
                def later(some: Pass, size: int) -> tuple[Any, Tensor]:
                    changed = selected(common_attn_metadata, some, size, block_size)
                    return build(0, changed, fast_build), changed.slot_mapping

                self.claa.groups.append(Group(self.layer_names, later=later))
                return None
            changed = unchanged(common_attn_metadata, plan, block_size, self.buffers)
            now = build(0, changed, fast_build), changed.slot_mapping
            self.claa.groups.append(Group(self.layer_names, now=now))
            return now[0]

    return subclass_attention_backend("Kept", base, KeptBuilder)
