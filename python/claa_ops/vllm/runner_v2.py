"""Which requests are in the batch: the V2 runner has a hook for what a model has to know."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from claa_ops.vllm.plan import Batch
from claa_ops.vllm.runtime import Runtime


class ClaaModelState(DefaultModelState):
    """Tells the runtime of each step's requests."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.claa: Runtime = model.claa
        most = vllm_config.scheduler_config.max_num_seqs
        self.rows: dict[str, int] = {}
        # By the runner's numbers of requests.
        self.prompts, self.kept, self.cached = (np.zeros(most, np.int64) for _ in range(3))

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request is new, or begins anew after it was preempted; its prompt is the same."""
        super().add_request(req_index, new_req_data)
        request = new_req_data.req_id
        prompt = length_from_prompt_token_ids_or_embeds(
            new_req_data.prompt_token_ids, new_req_data.prompt_embeds
        )
        self.claa.forget(request)
        self.rows[request] = req_index
        self.prompts[req_index] = prompt
        kept = self.claa.kept_of(request, prompt, new_req_data.sampling_params)
        self.kept[req_index] = kept
        self.cached[req_index] = self.claa.settings.cached(prompt, kept)

    def remove_request(self, req_id: str) -> None:
        """A request is over, aborted or preempted."""
        super().remove_request(req_id)
        self.rows.pop(req_id, None)
        self.claa.forget(req_id)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The attention metadata of a step."""
        self.claa.start_step(self._batch(input_batch))
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _batch(self, batch: Any) -> Batch | None:
        requests = batch.req_ids[: batch.num_reqs]
        if requests[0] not in self.rows:  # a dummy batch
            return None
        rows = batch.idx_mapping_np[: batch.num_reqs]
        computed = batch.num_computed_tokens_np[: batch.num_reqs].astype(np.int64)
        return Batch(requests, self.prompts[rows], self.kept[rows], computed, self.cached[rows])


def register() -> None:
    """Wrap two methods, once: a step in which a prompt ends is no decode.

    Where it has one token of each request, the runner would replay a whole CUDA graph, in which no
    selection runs.
    """
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "claa"):
        return
    GPUModelRunner.claa = True
    execute, dispatch = GPUModelRunner.execute_model, CudaGraphManager.dispatch

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        claa = getattr(self.model, "claa", None)
        if claa is not None and self.cudagraph_manager is not None:
            self.cudagraph_manager.claa_prompts = _has_prompts(self.model_state, scheduler_output)
        return execute(self, scheduler_output, *args, **kwargs)

    # Called by keyword as well: the names are part of the interface.
    @functools.wraps(dispatch)
    def dispatch_(
        self: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        uniform = None if getattr(self, "claa_prompts", False) else uniform_token_count
        return dispatch(self, num_reqs, num_tokens, uniform, *args, **kwargs)

    GPUModelRunner.execute_model = execute_model
    CudaGraphManager.dispatch = dispatch_


def _has_prompts(state: ClaaModelState, scheduler_output: Any) -> bool:
    """Whether a step has tokens of a prompt that is not over."""
    if scheduler_output.scheduled_new_reqs:
        return True
    cached = scheduler_output.scheduled_cached_reqs
    rows = np.fromiter((state.rows.get(each, -1) for each in cached.req_ids), np.int64)
    computed = np.asarray(cached.num_computed_tokens, np.int64)
    return bool((computed < state.prompts[rows])[rows >= 0].any())
