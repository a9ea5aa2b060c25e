"""vLLM engines in this process, on a tiny random model, beside our adapter on each prompt alone."""

from __future__ import annotations

import gc
import os
import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vLLM is imported, which reads them then.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

from claa_ops.methods import Method
from support.tiny_checkpoint import tiny_tokenizer

LAYERS = 8
CONTEXT = 4096
Prompt = Sequence[int]


def save_tiny_llama(folder: Path, context: int = CONTEXT) -> str:
    """A random Llama whose attention is far from uniform, with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,  # an even number, for two devices
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.12)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, none of them special."""
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


# Of prompts that are served together, what each asks for; with min_prompt 60 the fifth is whole.
MIXED = prompts([300, 280, 330, 310, 57, 290])
MIXED_ASKS: list[dict[str, Any] | None] = [
    None,
    {"claa_keep": 0.5},
    {"claa_keep": "all"},
    {"claa_protect": [0, 40, 100, 130, 305, 310]},
    None,
    {"claa_keep": 64},
]


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
        tokens: the answer.
        kept: positions of the prompt that went deeper; None if all did.
        logprobs: of each token of the answer.
    """

    tokens: list[int]
    kept: list[int] | None
    logprobs: list[float]


class Engine:
    """An engine in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def runner(self) -> Any:
        """The worker's."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def runtime(self) -> Any:
        """Our own part of the model."""
        return self.runner.get_model().claa

    @property
    def scheduler(self) -> Any:
        """vLLM's."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def held_blocks(self) -> list[int]:
        """How many blocks the requests of each group hold."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return [sum(map(len, manager.req_to_blocks.values())) for manager in managers]

    def assert_idle(self) -> None:
        """No block is held, and no prompt."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is never lent
        assert not any(self.held_blocks())
        assert not self.runtime.prompts

    def hits(self) -> list[int]:
        """From now on, how much of each prompt was cached."""
        manager = self.scheduler.kv_cache_manager
        return _noting(manager, "get_computed_blocks", lambda found, *_: found[1])

    def preemptions(self) -> list[int]:
        """From now on, how many tokens each preempted request had answered."""
        return _noting(
            self.scheduler, "_preempt_request", lambda done, request, *_: request.num_output_tokens
        )

    def answers(
        self,
        asked: Sequence[Prompt],
        new: int = 12,
        extra: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
        **params: Any,
    ) -> list[Answer]:
        """Greedy answers to prompts that are served together; ``extra`` is what they ask for."""
        from vllm import SamplingParams

        each = [extra] * len(asked) if extra is None or isinstance(extra, dict) else extra
        settings = dict(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=0) | params
        pruned = hasattr(self.runner.get_model(), "claa")
        log: dict[str, torch.Tensor] = {}
        if pruned:
            self.runtime.log = log
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in asked],
            [SamplingParams(extra_args=own and dict(own), **settings) for own in each],
            use_tqdm=False,
        )
        # Inside the engine a request's id may have a suffix.
        kept = {name.split("-")[0]: positions.tolist() for name, positions in log.items()}
        return [
            Answer(
                tokens=list(output.outputs[0].token_ids),
                kept=kept.get(output.request_id),
                logprobs=[
                    step[token].logprob
                    for token, step in zip(
                        output.outputs[0].token_ids, output.outputs[0].logprobs or [], strict=False
                    )
                ],
            )
            for output in outputs
        ]


def assert_same(answers: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    """The same tokens of the prompts, and the same answers."""
    assert [each.kept for each in answers] == [each.kept for each in wanted]
    assert [each.tokens for each in answers] == [each.tokens for each in wanted]


def _noting(owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """What a method's calls give and are given, from now on."""
    noted: list[Any] = []
    plain = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        noted.append(note(result, *args))
        return result

    setattr(owner, name, method)
    return noted


@contextmanager
def engine(
    model: str,
    claa: dict[str, Any] | None = None,
    architecture: str = "ClaaLlamaForCausalLM",
    **options: Any,
) -> Iterator[Engine]:
    """Start an engine, of plain vLLM if ``claa`` is None, and end it."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    settings: dict[str, Any] = dict(
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_batched_tokens=8192,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )
    if claa is not None:
        settings["hf_overrides"] = {"architectures": [architecture]}
        settings["additional_config"] = {"claa": claa}
    llm = LLM(model, **(settings | options))
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
        # Graphs of one process share a pool of memory, which is gone with the last of them.
        type(current_platform)._global_graph_pool = None


def begin_log(model: Any) -> None:
    """Have a worker log what it keeps."""
    model.claa.log = {}


def logged(model: Any) -> dict[str, list[int]]:
    """What a worker has kept since then."""
    return {name: positions.tolist() for name, positions in model.claa.log.items()}


def alone(model: str, asked: Sequence[Prompt], method: Method, new: int = 12) -> list[Answer]:
    """Kept tokens and greedy answers of our adapter, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    from claa_ops.prefill import attach, decode
    from claa_ops.prefill import prefill as run

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    attach(loaded)
    answers = []
    for ids in asked:
        done = run(loaded, torch.tensor([list(ids)]), method)
        kept = None if done.positions is None else done.positions[0].tolist()
        tokens = decode(loaded, done, max_new_tokens=new, eos_token_id=[])[0].tolist()
        answers.append(Answer(tokens, kept, []))
    return answers


def interpret_triton() -> None:
    """Have vLLM take Triton on a CPU, whose interpreter runs the V2 runner's kernels.

    To be called before anything imports vLLM, in a process that was started with
    TRITON_INTERPRET=1: Triton reads it when it is imported.
    """
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    stub = types.SimpleNamespace(driver=driver, compiler=None)
    triton.backends.backends["cpu"] = stub  # type: ignore[assignment]
