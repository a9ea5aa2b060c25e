"""What cannot be served, one sentence for each, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from claa_ops.vllm.architectures import ARCHITECTURES
from claa_ops.vllm.settings import Settings, parse

# What the extra `vllm` of pyproject.toml admits.
OLDEST, NEWER_THAN_NEWEST = (0, 25, 1), (0, 34)

PLAIN_CACHES = ("auto", "float32", "float16", "bfloat16")


def supported(version: str) -> bool:
    """Whether this is a release of vLLM that the plug-in knows.

    Example:
        >>> supported("0.33.0+cpu"), supported("0.24.0"), supported("0.34.0rc1")
        (True, False, False)
    """
    release = Version(version).release
    return OLDEST <= release and release[:2] < NEWER_THAN_NEWEST


def check(config: Any) -> None:
    """Refuse what would give wrong answers, or end a worker later.

    Args:
        config: vLLM's ``VllmConfig``, also of a model without selection.

    Raises:
        ValueError: with the first reason.
    """
    if config.model_config is None:
        return
    architecture = (config.model_config.architectures or [None])[0]
    given = (config.additional_config or {}).get("claa")
    if given is None and architecture not in ARCHITECTURES:
        return
    _check_version()
    if architecture not in ARCHITECTURES:
        raise ValueError(f"claa: {_unknown(architecture)}")
    _check_caches(parse(given, config.model_config.hf_text_config.num_hidden_layers))
    for what, why in refused(config):
        raise ValueError(f"claa: prefill with a selection does not serve {what}: {why}")


def _check_version() -> None:
    import vllm

    if not supported(vllm.__version__):
        oldest = ".".join(map(str, OLDEST))
        newest = ".".join(map(str, NEWER_THAN_NEWEST))
        raise ValueError(
            f"claa: vLLM must be at least {oldest} and below {newest}, got {vllm.__version__}"
        )


def _unknown(architecture: str | None) -> str:
    ours = f"Claa{architecture}"
    if ours in ARCHITECTURES:
        return (
            'additional_config["claa"] needs the model class with a selection: '
            f'hf_overrides={{"architectures": ["{ours}"]}}, got {architecture}'
        )
    served = ", ".join(name.removeprefix("Claa") for name in ARCHITECTURES)
    return f"the model must be one of {served}, got {architecture}"


def refused(config: Any) -> Iterator[tuple[str, str]]:
    """What of a configuration is not served, and why."""
    for present, what, why in _rows(config):
        if present:
            yield what, why


def _rows(config: Any) -> Iterator[tuple[Any, str, str]]:
    import vllm.envs as envs

    model, parallel, scheduler = (
        config.model_config,
        config.parallel_config,
        config.scheduler_config,
    )
    yield (
        parallel.pipeline_parallel_size > 1,
        "pipeline parallelism",
        "the layers before and after the selection have to be on one rank",
    )
    yield (
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "context parallelism",
        "the caches behind the selection are not sharded by position",
    )
    yield (
        config.speculative_config is not None,
        "speculative decoding",
        "a drafter reads the hidden states and caches of all tokens",
    )
    events = getattr(config, "kv_events_config", None)
    yield (
        config.kv_transfer_config is not None or (events and events.enable_kv_cache_events),
        "KV connectors and KV events",
        "they address blocks by token, alike in all layers",
    )
    yield (
        scheduler.disable_hybrid_kv_cache_manager,
        "a disabled hybrid KV cache manager",
        "the layers behind the selection need blocks of their own",
    )
    yield (
        config.lora_config is not None,
        "LoRA",
        "its map from tokens to adapters has the length of the whole batch",
    )
    yield (
        model.runner_type != "generate",
        "pooling and embedding models",
        "the hidden states of dropped tokens do not exist",
    )
    yield (
        not _full_attention(model),
        "sliding-window, chunked, linear or latent attention",
        "a window behind a selection would go by index",
    )
    yield (
        config.cache_config.cache_dtype not in PLAIN_CACHES,
        "a quantized KV cache",
        "scoring reads the keys as they are",
    )
    yield (
        parallel.use_ubatching,
        "micro-batches",
        "a step is planned as one batch",
    )
    yield (
        config.cache_config.kv_sharing_fast_prefill,
        "fast prefill of layers that share caches",
        "both choose which tokens a layer sees",
    )
    yield (
        envs.VLLM_USE_RUST_FRONTEND,
        "the Rust front end",
        "requests are checked in the Python one",
    )


def _check_caches(settings: Settings) -> None:
    """Refuse compressed caches where vLLM has no place for what they need."""
    if settings.compressed and not has_place_for_compressed():
        import vllm

        raise ValueError(
            "claa: keep_kv below 1 needs a vLLM whose cache specs say how wide block tables are "
            "and whose scheduler can be told where to split a prompt, as 0.32 does, got "
            f"{vllm.__version__}"
        )


def has_place_for_compressed() -> bool:
    """Whether this vLLM asks a spec how wide block tables are, and where a prompt is split."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheSpec

    places = ((KVCacheSpec, "max_num_blocks_per_req"), (Scheduler, "_mamba_block_aligned_split"))
    return all(hasattr(*place) for place in places)


def _full_attention(model: Any) -> bool:
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    if set(kinds) - {"full_attention"} or model.use_mla:
        return False
    return bool(kinds) or model.get_sliding_window() is None
