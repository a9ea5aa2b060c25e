"""vLLM's methods that are wrapped in every process take what they took before."""

import inspect

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from vllm.config import VllmConfig
from vllm.renderers import BaseRenderer
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from claa_ops.vllm import register

WRAPPED = [
    (VllmConfig, "try_verify_and_update_config"),
    (InputProcessor, "process_inputs"),
    (BaseRenderer, "render_chat"),
    (BaseRenderer, "render_chat_async"),
    (KVCacheManager, "__init__"),
    (KVCacheManager, "get_computed_blocks"),
    (Scheduler, "__init__"),
    (RunnerV1, "_build_attention_metadata"),
    (RunnerV1, "_determine_batch_execution_and_padding"),
    (RunnerV2, "execute_model"),
    (CudaGraphManager, "dispatch"),
]
REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(
    ("owner", "name"), WRAPPED, ids=lambda value: getattr(value, "__name__", value)
)
def test_names_and_number_of_arguments(owner, name):
    """Callers, in engines without a selection too, give some by position and others by name."""
    register()
    method = getattr(owner, name)
    ours = inspect.signature(method, follow_wrapped=False).parameters.values()
    theirs = list(inspect.signature(method.__wrapped__).parameters)
    named = [each.name for each in ours if each.kind not in REST]
    assert named == theirs[: len(named)]
    assert len(theirs) == len(named) or {each.kind for each in ours} >= {*REST}
