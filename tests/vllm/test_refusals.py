"""What is not served is refused in one sentence: engines at start, requests before they run."""

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from types import SimpleNamespace

from vllm import EngineArgs
from vllm.exceptions import VLLMValidationError

from claa_ops.vllm import refusals
from support.engines import engine, prompts

CLAA = {"method": "claa", "layer": 4, "keep": 0.2}


def configure(model, claa=CLAA, architecture="ClaaLlamaForCausalLM", **options):
    """The configuration of an engine, which is where a start ends that is refused."""
    if architecture is not None:
        options["hf_overrides"] = {"architectures": [architecture]}
    if claa is not None:
        options["additional_config"] = {"claa": claa}
    args = EngineArgs(model, dtype="float32", skip_tokenizer_init=True, **options)
    return args.create_engine_config()


def test_what_is_served_is_not_refused(tiny_llama):
    config = configure(tiny_llama)
    assert list(refusals.refused(config)) == []


ENGINES = {
    "pipeline": (dict(pipeline_parallel_size=2), "does not serve pipeline parallelism"),
    "context": (
        dict(tensor_parallel_size=4, decode_context_parallel_size=2),
        "does not serve context parallelism",
    ),
    "speculative": (
        dict(
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            }
        ),
        "does not serve speculative decoding",
    ),
    "connector": (
        dict(
            kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        ),
        "does not serve KV connectors",
    ),
    "hybrid": (
        dict(disable_hybrid_kv_cache_manager=True),
        "does not serve a disabled hybrid KV cache manager",
    ),
    "lora": (dict(enable_lora=True), "does not serve LoRA"),
    "pooling": (dict(runner="pooling"), "pooling|must be one of"),
    "quantized": (dict(kv_cache_dtype="fp8"), "does not serve a quantized KV cache"),
    "micro-batches": (dict(enable_dbo=True), "does not serve micro-batches"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_refused_before_it_loads_weights(tiny_llama, name):
    options, sentence = ENGINES[name]
    with pytest.raises(ValueError, match=f"claa: .*({sentence})"):
        configure(tiny_llama, **options)


SETTINGS = {
    "layer": (CLAA | {"layer": 7}, r"layer must be in \[0, 6\].* got 7"),
    "keep": (CLAA | {"keep": 1.5}, "keep must be .* got 1.5"),
    "method": (CLAA | {"method": "peek"}, "unknown method 'peek': did you mean 'peak'"),
    "kind": ({"method": "snapkv"}, "claa: method must .* got"),
    "setting": (CLAA | {"windw": 3}, "a setting must be one of .* got windw"),
    "min_prompt": (CLAA | {"min_prompt": -1}, "min_prompt must be .* got -1"),
    "no method": ({"keep": 0.1}, "must name a method"),
    "nothing": (None, "must name a method"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_refused(tiny_llama, name):
    given, sentence = SETTINGS[name]
    with pytest.raises(ValueError, match=sentence):
        configure(tiny_llama, claa=given)


def test_settings_without_our_architecture_name_it(tiny_llama):
    with pytest.raises(
        ValueError, match="needs the model class .*ClaaLlamaForCausalLM.* got Llama"
    ):
        configure(tiny_llama, architecture=None)


def test_a_model_of_another_family(tiny_llama):
    with pytest.raises(ValueError, match="must be one of LlamaForCausalLM.* got GPT2LMHeadModel"):
        configure(tiny_llama, architecture="GPT2LMHeadModel")


def test_a_release_outside_the_range(tiny_llama, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.24.0")
    with pytest.raises(ValueError, match=r"at least 0\.25\.1 and below 0\.34, got 0\.24\.0"):
        configure(tiny_llama)


def test_compressed_caches_need_a_vllm_that_has_a_place_for_them(tiny_llama, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    compressed = CLAA | {"keep_kv": 0.3, "first_full": 0}
    if refusals.has_place_for_compressed():
        assert configure(tiny_llama, claa=compressed)
        monkeypatch.delattr(Scheduler, "_mamba_block_aligned_split")
    with pytest.raises(ValueError, match="keep_kv below 1 needs a vLLM whose .* got 0"):
        configure(tiny_llama, claa=compressed)
    assert configure(tiny_llama)


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("0.25.1", True),
        ("0.33.0", True),
        ("0.33.4rc1+cu130", True),
        ("0.25.0", False),
        ("0.34.0", False),
        ("0.34.0rc1", False),
        ("1.0", False),
    ],
)
def test_which_releases_are_served(version, served):
    assert refusals.supported(version) is served


@pytest.mark.parametrize(
    ("text", "full"),
    [
        (dict(layer_types=["full_attention"] * 8), True),
        (dict(layer_types=["full_attention", "sliding_attention"] * 4), False),
        (dict(layer_types=["linear_attention", "full_attention"] * 4), False),
        (dict(layer_types=None), True),
    ],
)
def test_layers_must_have_full_attention(text, full):
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**text), use_mla=False, get_sliding_window=lambda: None
    )
    assert refusals._full_attention(model) is full
    model.get_sliding_window = lambda: 4096
    assert refusals._full_attention(model) is (full and text["layer_types"] is not None)


class TestRequests:
    """All are refused by an engine that goes on serving."""

    @pytest.fixture(scope="class")
    def served(self, tiny_llama):
        with engine(tiny_llama, CLAA) as started:
            yield started

    REQUESTS = {
        "prompt logprobs": (dict(prompt_logprobs=1), "prompt_logprobs must be left out.* got 1"),
        "keep": (dict(extra={"claa_keep": 1.5}), r"claa_keep must be a rate .* got 1\.5"),
        "keep text": (dict(extra={"claa_keep": "most"}), "tokens or \"all\", got 'most'"),
        "span beyond": (dict(extra={"claa_protect": [0, 101]}), r"in \[0, 100\].* got 0, 101"),
        "half a span": (dict(extra={"claa_protect": [3]}), r"pairs begin, end .* got \[3\]"),
        "unknown name": (dict(extra={"claa_protect": "sytem"}), "any of system, tools, template"),
        "no tokenizer": (dict(extra={"claa_protect": "system"}), "there is no chat template and"),
        "unknown": (dict(extra={"claa_kept": 3}), "may set claa_keep and claa_protect, got"),
    }

    @pytest.mark.parametrize("name", REQUESTS)
    def test_a_request_is_refused(self, served, name):
        params, sentence = self.REQUESTS[name]
        (prompt,) = prompts([100])
        before = served.answers([prompt])
        with pytest.raises(VLLMValidationError, match=sentence):
            served.answers([prompt], **params)
        assert served.answers([prompt]) == before
        assert set(served.held_blocks()) == {0}
