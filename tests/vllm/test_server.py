"""``claa-ops serve`` as a user starts it, and the `openai` package as a user asks."""

import asyncio
import json
import urllib.request

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

import openai

from claa_ops.methods import Peak
from support.chat_templates import BARE, CHATML
from support.engines import alone, prompts
from support.servers import server

ASKED = prompts([300, 57, 640, 130, 412])
NEW = 8
OFTEN = {"temperature": 0, "max_tokens": NEW, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def served(tiny_llama, log):
    arguments = ("--method", "peak:window=8", "--layer", "3", "--keep", "20%")
    arguments += ("--protect", "system")
    own = ("--max-num-batched-tokens", "256", "--max-num-seqs", "4", "--max-model-len", "2048")
    template = log.with_name("template.jinja")
    template.write_text(CHATML)
    own += ("--chat-template", str(template))
    metrics = log.with_name("metrics")
    metrics.mkdir()
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "VLLM_LOG_STATS_INTERVAL": "1"}
    with server(tiny_llama, log, *arguments, vllm=own, variables=variables) as address:
        yield address


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """Answers of our adapter, each prompt alone."""
    answers = alone(tiny_llama, ASKED, Peak(layer=3, keep=0.2, window=8, keep_kv=1.0), NEW)
    return [answer.tokens for answer in answers]


def complete(client, model, ids, xargs=None, **options):
    # Tokens are compared: random ones are no text, of which a stream shows what is whole.
    body = {"ignore_eos": True, "return_token_ids": True} | ({"vllm_xargs": xargs} if xargs else {})
    return client.completions.create(
        model=model, prompt=ids, temperature=0, max_tokens=NEW, extra_body=body, **options
    )


def tokens(answer):
    return [token for choice in answer.choices for token in choice.token_ids]


def metric(served: str, name: str) -> float:
    with urllib.request.urlopen(f"{served}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return float(line.split()[-1])


def test_the_start_says_the_plan(served, log):
    said = log.read_text()
    assert "claa: peak after layer 3: 4 layers see whole prompts, 4 see 20% of them" in said
    assert "times as many" in said and "claa: never dropped beside them: system" in said


def test_answers_are_those_of_the_adapter(client, tiny_llama, expected):
    assert [tokens(complete(client, tiny_llama, ids)) for ids in ASKED] == expected


def test_a_stream_has_the_same_tokens(client, tiny_llama, expected):
    parts = list(complete(client, tiny_llama, ASKED[0], stream=True))
    assert len(parts) > 1
    assert [token for part in parts for token in tokens(part)] == expected[0]


def test_many_at_once_some_of_them_aborted(served, tiny_llama, expected):
    many = openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=300)

    async def ask(ids):
        done = await complete(many, tiny_llama, ids)
        return tokens(done)

    async def give_up(ids):
        stream = await many.completions.create(
            model=tiny_llama,
            prompt=ids,
            temperature=0,
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await stream.close()

    async def all_of_them():
        gone = [give_up(ids) for ids in ASKED]
        return (await asyncio.gather(*[ask(ids) for ids in ASKED * 3], *gone))[: 3 * len(ASKED)]

    assert asyncio.run(all_of_them()) == expected * 3


def test_a_request_says_what_is_kept_and_metrics_tell(client, served, tiny_llama):
    names = [f'claa:prompt_tokens_total{{seen="{what}"}}' for what in ("prompt", "kept")]
    complete(client, tiny_llama, ASKED[1])  # there are counters from the first request on
    before = [metric(served, name) for name in names]
    whole = complete(client, tiny_llama, ASKED[2], {"claa_keep": "all"})
    half = complete(client, tiny_llama, ASKED[2], {"claa_keep": 0.5})
    spans = complete(client, tiny_llama, ASKED[2], {"claa_protect": "0,240"})
    assert len({tuple(tokens(each)) for each in (whole, half, spans)}) > 1
    counted = [metric(served, name) - old for name, old in zip(names, before, strict=True)]
    assert counted == [3 * 640, 640 + 320 + 240 + 80]
    assert metric(served, "claa:keep_rate_count") >= 3


@pytest.mark.parametrize(
    ("xargs", "options", "sentence"),
    [
        ({"claa_keep": 2.5}, {}, "claa: claa_keep must be a rate in (0, 1]"),
        ({"claa_protect": "0, 999"}, {}, "in [0, 57], as one list, got 0, 999"),
        ({"claa_protect": "sistem"}, {}, "must name any of system, tools, template"),
        ({"claa_kept": 3}, {}, "a request may set claa_keep and claa_protect, got claa_kept"),
        ({}, {"echo": True, "logprobs": 1}, "claa: prompt_logprobs must be left out"),
    ],
)
def test_a_bad_request_is_a_400_and_the_server_goes_on(
    client, tiny_llama, expected, xargs, options, sentence
):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, tiny_llama, ASKED[1], xargs, **options)
    assert refused.value.status_code == 400 and sentence in str(refused.value)
    assert tokens(complete(client, tiny_llama, ASKED[1])) == expected[1]


def test_the_time_of_selections_is_in_metrics_and_in_the_log(served, log):
    assert metric(served, "claa:selection_seconds_count") > 0
    assert metric(served, "claa:selection_seconds_sum") > 0
    assert "steps with a selection in" in log.read_text()


def test_a_chat(client, tiny_llama):
    answer = client.chat.completions.create(
        model=tiny_llama,
        messages=[{"role": "user", "content": "What does an assert statement do? " * 8}],
        **OFTEN,
    )
    assert answer.usage.completion_tokens == NEW


@pytest.mark.parametrize("protect", [None, "none", ["system"], ["system", "tools"], ["tools"]])
def test_a_chat_protects_by_name(client, served, tiny_llama, protect):
    """And as its server does if it says nothing."""
    system, tool = "Answer in one word. " * 12, {"type": "function", "function": {"name": "now"}}
    question, kept = "Who wrote this? " * 20, 'claa:prompt_tokens_total{seen="kept"}'
    before = metric(served, kept)
    answer = client.chat.completions.create(
        model=tiny_llama,
        messages=[{"role": "system", "content": system}, {"role": "user", "content": question}],
        tools=[tool],
        tool_choice="none",
        **OFTEN | {"extra_body": {"vllm_xargs": {"claa_protect": protect} if protect else {}}},
    )
    # A token is a byte.
    prompt = answer.usage.prompt_tokens
    first = prompt - len(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    begin = len(f"<|im_start|>system\n{system}") if protect == ["tools"] else 0
    protected = first - begin + min(begin, 4)  # the sinks are kept anyway
    protected = 0 if protect == "none" else protected
    assert metric(served, kept) - before == protected + (prompt - protected) // 5


def test_a_chat_without_what_is_named_is_served_as_any(client, served, tiny_llama):
    kept = 'claa:prompt_tokens_total{seen="kept"}'
    before = metric(served, kept)
    messages = [{"role": "user", "content": "Who wrote this? " * 20}]
    answer = client.chat.completions.create(
        model=tiny_llama,
        messages=messages,
        **OFTEN | {"extra_body": {"vllm_xargs": {"claa_protect": "system,tools"}}},
    )
    assert metric(served, kept) - before == answer.usage.prompt_tokens // 5


def test_nothing_is_held_when_all_is_over(served):
    assert metric(served, "vllm:num_requests_running") == 0
    assert metric(served, "vllm:kv_cache_usage_perc") == 0


def test_a_server_is_refused_in_one_sentence(tiny_llama, tmp_path):
    import subprocess
    import sys

    def refuse(*arguments):
        command = [sys.executable, "-m", "claa_ops", "serve", tiny_llama, "--dry-run", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = refuse("--layer", "7")
    assert done.returncode == 2 and "layer must be in [0, 6]" in done.stderr
    done = refuse("--method", "snapkv")
    assert done.returncode == 2 and "method must drop tokens after a layer" in done.stderr
    done = refuse("--keep", "half")
    assert done.returncode == 2 and "keep must be a rate" in done.stderr
    done = refuse("--protect", "sytem")
    assert done.returncode == 2 and "protect must name any of system, tools, temp" in done.stderr
    template = tmp_path / "template.jinja"
    template.write_text(BARE)
    done = refuse("--protect", "system", "--", "--chat-template", str(template))
    assert done.returncode == 2 and '"system" needs a chat template that puts' in done.stderr
    template.write_text(CHATML)
    done = refuse("--protect", "system, tools", "--", f"--chat-template={template}")
    assert done.returncode == 0 and '"protect": "system, tools"' in json.loads(done.stdout)[-2]
    done = refuse("--keep", "0.1", "--", "--port", "81")
    assert done.returncode == 0 and json.loads(done.stdout)[-2:] == ["--port", "81"]
