"""What the V1 runner does not tell a model: which requests are in the batch.

The V2 runner has a hook for this; here two methods of the runner are wrapped.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from claa_ops.vllm.plan import Batch


def register() -> None:
    """Wrap the runner's methods, once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "claa"):
        return
    GPUModelRunner.claa = True
    _wrap_metadata(GPUModelRunner)
    _wrap_uniform(GPUModelRunner)


def _wrap_metadata(runner: Any) -> None:
    plain = runner._build_attention_metadata

    @functools.wraps(plain)
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        claa = getattr(self.get_model(), "claa", None)
        if claa is not None:
            claa.known = self.requests
            capture = kwargs.get("for_cudagraph_capture", False)
            claa.start_step(None if capture else _batch(self.input_batch, claa, self.requests))
        return plain(self, *args, **kwargs)

    runner._build_attention_metadata = _build_attention_metadata


def _wrap_uniform(runner: Any) -> None:
    """A step with the last token of a prompt is no decode, though it may have one token a row."""
    plain = runner._determine_batch_execution_and_padding

    @functools.wraps(plain)
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        claa = getattr(self.get_model(), "claa", None)
        batch = self.input_batch
        rows = batch.num_reqs
        if claa is not None and kwargs.get("force_uniform_decode") is None:
            prefilling = batch.num_computed_tokens_cpu[:rows] < batch.num_prompt_tokens[:rows]
            if prefilling.any():
                kwargs["force_uniform_decode"] = False
        return plain(self, *args, **kwargs)

    runner._determine_batch_execution_and_padding = _determine_batch_execution_and_padding


def _batch(batch: Any, claa: Any, requests: Any) -> Batch | None:
    rows = batch.num_reqs
    if not rows:  # a dummy batch
        return None
    prompts = np.asarray(batch.num_prompt_tokens[:rows], dtype=np.int64)
    pairs = zip(batch.req_ids[:rows], prompts.tolist(), strict=True)
    each = (claa.kept_of(name, prompt, requests[name].sampling_params) for name, prompt in pairs)
    kept = np.fromiter(each, dtype=np.int64, count=rows)
    computed = np.asarray(batch.num_computed_tokens_cpu[:rows], dtype=np.int64)
    both = zip(prompts.tolist(), kept.tolist(), strict=True)
    cached = np.fromiter((claa.settings.cached(*each) for each in both), np.int64, count=rows)
    return Batch(list(batch.req_ids[:rows]), prompts, kept, computed, cached)
