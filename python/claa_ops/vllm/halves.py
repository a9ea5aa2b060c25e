"""The layers before and behind the selection: two compiled halves, each with CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import ForwardContext


class _Half(nn.Module):
    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        model: nn.Module,
        layers: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        # In plain sequences: the model owns the weights, which would have two names otherwise.
        self.model: Any = (model,)
        self.layers = list(layers)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0},
)
class Front(_Half):
    """The embedding and the layers that see the whole prompt."""

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and residual, ``[tokens, C]`` each."""
        hidden = inputs_embeds
        if hidden is None:
            hidden = self.model[0].embed_input_ids(input_ids)
        residual: Any = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


@support_torch_compile(
    dynamic_arg_dims={"positions": 0, "hidden": 0, "residual": 0},
)
class Back(_Half):
    """The layers behind the selection, and the last norm."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor) -> Tensor:
        """The model's output, ``[tokens, C]``."""
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.model[0].norm(hidden, residual)[0]


class Inputs:
    """Where the back half's piecewise CUDA graphs read their inputs, at every replay.

    They run with as many tokens as go deeper, not with those of the batch; so they have sizes and
    a descriptor of their own.

    Args:
        vllm_config: of the engine.
        width: C, of the hidden states.
    """

    def __init__(self, vllm_config: VllmConfig, width: int) -> None:
        most = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        dtype = vllm_config.model_config.dtype
        self.positions = torch.zeros(most, dtype=torch.int64)
        self.hidden = torch.zeros(most, width, dtype=dtype)
        self.residual = torch.zeros(most, width, dtype=dtype)
        self._captured: dict[int, Any] = {}

    def hold(self, context: ForwardContext, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs of a batch that goes deeper as it is, where a graph, if one runs, reads them.

        Args:
            context: of the step.
            inputs: positions, hidden states and residual.
        """
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return inputs
        tokens = inputs[0].shape[0]
        self._captured[tokens] = context.batch_descriptor
        own = self._first(tokens)
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        return own

    def _first(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.positions[:tokens], self.hidden[:tokens], self.residual[:tokens]

    def padded(self, context: ForwardContext, tokens: int, batch: int) -> int | None:
        """The size of the smallest graph for so many tokens; None if there is none, or may not run.

        Args:
            context: of the step.
            tokens: how many go deeper.
            batch: how many the batch has.
        """
        sizes = [size for size in self._captured if size >= tokens]
        mode = context.cudagraph_runtime_mode
        # A batch that is too large for a graph says nothing about whether graphs may run.
        allowed = mode == CUDAGraphMode.PIECEWISE or batch > max(self._captured, default=batch)
        return min(sizes) if sizes and allowed else None

    def empty(self, size: int | None, tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, hidden states and residual of the tokens that go deeper, to be filled."""
        if size is not None:
            return self._first(size)
        states = like.new_empty(2, tokens, like.shape[1])
        return self.positions.new_empty(tokens), states[0], states[1]

    @contextmanager
    def running(self, context: ForwardContext, size: int | None) -> Iterator[None]:
        """The context says which graph of the back half runs, or that none does."""
        before = context.cudagraph_runtime_mode, context.batch_descriptor
        if size is None:
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        else:
            context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
            context.batch_descriptor = self._captured[size]
        try:
            yield
        finally:
            context.cudagraph_runtime_mode, context.batch_descriptor = before
