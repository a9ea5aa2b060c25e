"""vLLM's models of the Llama form, whose deeper layers see the selected tokens only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from claa_ops.vllm.architectures import ARCHITECTURES
from claa_ops.vllm.attention import deepen, watch
from claa_ops.vllm.groups import Groups
from claa_ops.vllm.halves import Back, Front, Inputs
from claa_ops.vllm.hidden import ParkedHidden
from claa_ops.vllm.metrics import SelectionTimes
from claa_ops.vllm.parallel import reduction
from claa_ops.vllm.plan import Pass, Plan, to_device
from claa_ops.vllm.runtime import Group, Runtime
from claa_ops.vllm.settings import parse

logger = init_logger("vllm.claa_ops")  # a child of vLLM's, which prints


class Selecting:
    """What our architectures add to one of vLLM's models, which comes next among their bases.

    Weights load as they do in that model.
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        given = vllm_config.additional_config.get("claa")
        settings = parse(given, vllm_config.model_config.hf_text_config.num_hidden_layers)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        layers = list(self.model.layers)
        cut = settings.layer + 1
        parked = ParkedHidden(
            _attention(layers[0], 0),
            groups=Groups(cut, len(layers) - cut, compressed=len(settings.compressed)),
            width=vllm_config.model_config.get_hidden_size(),
            window=settings.method.window,
            prefix=prefix,
            vllm_config=vllm_config,
        )
        caches = bool(vllm_config.cache_config.enable_prefix_caching)
        reduce = reduction(settings, vllm_config.model_config)
        self.claa = Runtime(settings, parked, caches=caches, reduce=reduce, timed=_timed())
        for index, layer in enumerate(layers):
            attention = _attention(layer, index)
            if index <= settings.layer:
                watch(attention, index, self.claa)
            else:
                deepen(attention, self.claa)
        with set_model_tag("claa_front"):
            front = Front(
                vllm_config=vllm_config,
                prefix=f"{prefix}.claa_front",
                model=self.model,
                layers=layers[:cut],
            )
        with set_model_tag("claa_back"):
            back = Back(
                vllm_config=vllm_config,
                prefix=f"{prefix}.claa_back",
                model=self.model,
                layers=layers[cut:],
            )
        self.halves = front, back
        self.claa_inputs = Inputs(vllm_config, self.model.config.hidden_size)
        self.most = vllm_config.scheduler_config.max_num_batched_tokens

    @staticmethod
    def get_model_state_cls() -> type:
        """Asked by the V2 runner."""
        from claa_ops.vllm.runner_v2 import ClaaModelState

        return ClaaModelState

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states ``[tokens, C]`` of the batch, where anything is sampled from."""
        context = get_forward_context()
        front, back = self.halves
        planned = context.attn_metadata is not None
        if planned:
            self._enter(context, self.claa.fronts, None, len(positions))
        hidden, residual = front(input_ids, positions, inputs_embeds)
        plan = self.claa.plan if planned else None
        if plan is not None and plan.prefilling:
            self.claa.park(hidden, residual)
        if plan is not None and not plan.same:
            return self._deeper(context, plan, positions, hidden, residual)
        if planned:
            self._enter(context, self.claa.groups, None, len(positions))
        inputs = self.claa_inputs.hold(context, positions, hidden, residual)
        return back(*inputs)

    def _enter(
        self, context: ForwardContext, groups: list[Group], some: Pass | None, size: int
    ) -> None:
        """The metadata and slots of what is about to go through the layers of these groups."""
        for group in groups:
            metadata, slots = group.metadata(some, size)
            for name in group.layer_names:
                context.attn_metadata[name] = metadata
                context.slot_mapping[name] = slots

    def _deeper(
        self,
        context: ForwardContext,
        plan: Plan,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor,
    ) -> Tensor:
        """What is sampled from, where the batch has it; zeros elsewhere."""
        inputs = self.claa_inputs
        batch = hidden.shape[0]
        whole = torch.zeros_like(hidden)
        tokens = plan.whole.tokens
        if not tokens:
            return whole
        size = inputs.padded(context, tokens, batch)
        deeper = inputs.empty(size, tokens, hidden)
        self._gather(plan, (positions, hidden, residual), deeper)
        outputs, begin = [], 0
        for some in plan.passes(self.most):
            end = begin + some.tokens if size is None else size
            self._enter(context, self.claa.groups, some, end - begin)
            with inputs.running(context, size):
                outputs.append(self.halves[1](*(each[begin:end] for each in deeper)))
            begin = end
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        last, place = (to_device(each, hidden.device) for each in plan.last_tokens())
        whole[place] = output[last]
        return whole

    def _gather(self, plan: Plan, batch: tuple[Tensor, ...], deeper: tuple[Tensor, ...]) -> None:
        """Fill in positions, hidden states and residual of the tokens that go deeper."""
        device = batch[0].device
        for begin, end, row in plan.runs():
            into = [each[begin:end] for each in deeper]
            if row is None:
                source = to_device(plan.source(begin, end), device)
                for mine, given in zip(into, batch, strict=True):
                    torch.index_select(given, 0, source, out=mine)
                continue
            with self.claa.clock.measure(device):
                kept = self.claa.select(row)
                place, states, rest = (each[: row.kept] for each in into)
                place.copy_(kept)  # a token's position is its place in the prompt
                if row.computed:
                    states.copy_(self.claa.take_parked(row, kept))
                    rest.zero_()
                else:
                    chunk = slice(row.begin, row.end)
                    torch.index_select(batch[1][chunk], 0, kept, out=states)
                    torch.index_select(batch[2][chunk], 0, kept, out=rest)
            # Tokens after the prompt: a preempted request's answer, computed anew.
            answer = row.end - (row.after - row.prompt)
            for each, given in zip(into, batch, strict=True):
                each[row.kept :].copy_(given[answer : row.end])


def _timed() -> Callable[[float], None]:
    """Is told how long selections take: of devices that do the same, the first one tells."""
    if get_tensor_model_parallel_rank():
        return lambda seconds: None
    return SelectionTimes(partial(logger.info, "%s"), envs.VLLM_LOG_STATS_INTERVAL).add


def _attention(layer: Any, index: int) -> Attention:
    """The attention of a layer, which must be full."""
    (attention,) = [module for module in layer.modules() if isinstance(module, Attention)]
    if attention.sliding_window is not None:
        raise ValueError(
            "claa: layers must have full attention, because a window behind a selection would go "
            f"by index, got a sliding window in layer {index}"
        )
    return attention


def __getattr__(name: str) -> type:
    """One of our architectures, made when it is first asked for: vLLM has many models to import."""
    if name not in ARCHITECTURES:
        raise AttributeError(name)
    module, base = ARCHITECTURES[name]
    found = importlib.import_module(f"vllm.model_executor.models.{module}")
    made = type(name, (Selecting, getattr(found, base)), {"__module__": __name__})
    globals()[name] = made
    return made
