"""``claa-ops serve``: vLLM's OpenAI server, the deeper layers of its model behind a selection."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from claa_ops._extras import require
from claa_ops.evaluate.parse import parse_budget
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.huggingface.models import InputError


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or a hub id.")],
    method: Annotated[
        str,
        typer.Option(
            help="claa, peak, fastkv, hops; with settings, such as peak:keep_kv=0.2:window=32."
        ),
    ] = "peak",
    layer: Annotated[
        int | None,
        typer.Option(
            help="The selection layer, from 0; it still sees every token. Default: the method's "
            "for this depth, or one near it that wastes less of the cache."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="Tokens of a prompt that the layers after it see: a rate (0.1, 10%) or a number."
        ),
    ] = "0.1",
    min_prompt: Annotated[
        int, typer.Option(min=0, help="Prompts of fewer tokens are served whole.")
    ] = 0,
    protect: Annotated[
        str,
        typer.Option(
            help="Parts of chats that are never dropped, unless a request says otherwise: system, "
            "tools, template, with commas between. They come on top of --keep."
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command line and stop.")
    ] = False,
) -> None:
    """Serve a model by vLLM; what follows -- are vLLM's own options, such as -- --port 8001."""
    require("vllm", "vllm")
    from claa_ops.vllm.arguments import engine_args, plan

    spec, budget = MethodSpec.parse(method), parse_budget("keep", keep)
    try:
        given = engine_args(
            model,
            method=spec.name,
            layer=layer,
            keep=budget,
            min_prompt=min_prompt,
            protect=protect,
            **spec.settings,
        )
        if protect:
            _find_parts(model, protect, context.args)
        lines = plan(model, given["additional_config"]["claa"])
    except ValueError as error:
        raise InputError(str(error).removeprefix("claa: ")) from error
    for line in lines:
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    for name in ("hf_overrides", "additional_config"):
        command += [f"--{name.replace('_', '-')}", json.dumps(given[name])]
    command += context.args
    if dry_run:
        print(json.dumps(command))
        return
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _find_parts(model: str, protect: str, arguments: list[str]) -> None:
    """Refuse parts that the chat template which vLLM will use cannot have."""
    from transformers import AutoTokenizer

    from claa_ops.huggingface.chat_parts import ChatParts

    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    given |= dict(pairwise(arguments))
    template = given.get("--chat-template")
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    try:
        tokenizer = AutoTokenizer.from_pretrained(given.get("--tokenizer", model))
    except OSError as error:
        raise InputError(f"cannot load the tokenizer, whose chat has the parts: {error}") from error
    ChatParts(tokenizer, protect, template)
