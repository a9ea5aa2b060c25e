"""A plug-in for vLLM: models whose deeper layers see only the prompt's important tokens.

Installed beside vLLM, it is found by it (entry point ``vllm.general_plugins``). A model is served
with a selection when its architecture is one of :data:`ARCHITECTURES` and the settings are given::

    LLM(
        "meta-llama/Llama-3.1-8B-Instruct",
        hf_overrides={"architectures": ["ClaaLlamaForCausalLM"]},
        additional_config={"claa": {"method": "peak", "layer": 8, "keep": 0.1}},
    )

:func:`engine_args` makes these arguments. The scheduler, the attention kernels and the sampler are
vLLM's own.
"""

from claa_ops.vllm.architectures import ARCHITECTURES
from claa_ops.vllm.arguments import engine_args

__all__ = ["ARCHITECTURES", "engine_args", "register"]


def register() -> None:
    """Make vLLM know the models, their caches and their runners.

    vLLM calls this in each of its processes, in some of them several times. With a release of vLLM
    that is not served, engines that ask for a selection are refused, and no other is touched.
    """
    import vllm

    import claa_ops.vllm.frontend as frontend
    import claa_ops.vllm.refusals as refusals

    frontend.check_engines()
    if not refusals.supported(vllm.__version__):
        return

    import claa_ops.vllm.runner_v1 as runner_v1
    import claa_ops.vllm.runner_v2 as runner_v2
    import claa_ops.vllm.scheduler as scheduler
    import claa_ops.vllm.spec as spec

    for name in ARCHITECTURES:
        vllm.ModelRegistry.register_model(name, f"claa_ops.vllm.model:{name}")
    frontend.check_requests()
    spec.register()
    scheduler.register()
    runner_v1.register()
    runner_v2.register()
