"""What is checked where a user waits for the answer: engines at start, requests before they run.

Three methods of vLLM are wrapped, in every process: how it checks a configuration, how it turns a
prompt into a request, and, since a request does not say by which chat template its messages became
a prompt, how it renders chats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import claa_ops.vllm.requests as requests
from claa_ops.chat import Chat, learn
from claa_ops.vllm.metrics import count
from claa_ops.vllm.refusals import check
from claa_ops.vllm.settings import Settings, parse


def check_engines() -> None:
    """Have vLLM refuse at start what is not served; to be called in each process, at least once."""
    from vllm.config import VllmConfig

    plain = VllmConfig.try_verify_and_update_config
    if hasattr(plain, "claa"):
        return

    @functools.wraps(plain)
    def try_verify_and_update_config(self: Any) -> None:
        check(self)
        plain(self)

    try_verify_and_update_config.claa = True  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def check_requests() -> None:
    """Have vLLM check what requests ask for, likewise."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    plain = InputProcessor.process_inputs
    if hasattr(plain, "claa"):
        return

    @functools.wraps(plain)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = plain(self, *args, **kwargs)
        if not hasattr(self, "claa"):
            self.claa = settings_of(self.vllm_config)
        if self.claa is not None:
            try:
                check_request(request, self.claa, lambda: _chat(self))
            except ValueError as error:  # a server answers this one with the status 400
                raise VLLMValidationError(str(error)) from error
        return request

    process_inputs.claa = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
    _note_chat_templates()


def _note_chat_templates() -> None:
    """Have renderers remember a chat template that is not the tokenizer's own."""
    from vllm.renderers import BaseRenderer

    def noting(plain: Any) -> Any:
        @functools.wraps(plain)
        def render(
            self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            self.claa_template = chat_params.chat_template
            return plain(self, conversations, chat_params, *args, **kwargs)

        return render

    for name in ("render_chat", "render_chat_async"):
        setattr(BaseRenderer, name, noting(getattr(BaseRenderer, name)))


def _chat(processor: Any) -> Chat:
    """The marks of the chat template by which a front end renders, learnt when first asked for."""
    template = getattr(processor.renderer, "claa_template", None)
    of, chat = getattr(processor, "claa_chat", (None, None))
    if chat is None or of != template:
        chat = learn(processor.tokenizer, template)
        processor.claa_chat = template, chat
    return chat


def settings_of(config: Any) -> Settings | None:
    """The settings of an engine; None if its model has no selection."""
    given = (config.additional_config or {}).get("claa")
    if given is None:
        return None
    return parse(given, config.model_config.hf_text_config.num_hidden_layers)


def check_request(request: Any, settings: Settings, chat: Callable[[], Chat]) -> None:
    """Refuse what a request may not ask for, and write down how many tokens it keeps.

    Args:
        request: vLLM's ``EngineCoreRequest``, whose sampling parameters are its own.
        settings: of the model.
        chat: the marks of the chat template, for what is protected by name.

    Raises:
        ValueError: with the reason.
    """
    params = request.sampling_params
    if params is None:
        return
    if params.prompt_logprobs is not None:
        raise ValueError(
            "claa: prompt_logprobs must be left out, because the hidden states of dropped tokens "
            f"do not exist, got {params.prompt_logprobs}"
        )
    if request.resumable:
        raise ValueError(
            "claa: a prompt must come as a whole, because its end ranks it, got a streamed input"
        )
    ids, embeds = request.prompt_token_ids, request.prompt_embeds
    prompt = len(embeds if ids is None else ids)

    def find(names: Sequence[str]) -> list[int]:
        try:
            return chat().spans(names, ids)
        except ValueError as error:
            raise type(error)(f"claa: {requests.PROTECT}: {error}") from None

    named = None if ids is None else find
    params.extra_args = requests.resolve(params.extra_args, settings, prompt, named)
    count(prompt, params.extra_args[requests.KEPT])
