"""Tiny random models of many families, and greedy generation that returns the logits."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from claa_ops.prefill import ClaaCache, Prefilled

VOCABULARY = 99
SLIDING_WINDOW = 16
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
UNSET = object()  # in place of a setting that a family does not take
EXTRA = {
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, attention: str | None = None, **changes) -> PreTrainedModel:
    """A model whose weights are large enough for its attention to be far from uniform."""
    settings = {**COMMON, **EXTRA.get(family, {}), **changes}
    settings = {name: value for name, value in settings.items() if value is not UNSET}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(family, **settings)
    return initialized(
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    )


def initialized(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that is made, with the weights of :func:`build`."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def prompt(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts, padded on the left to the longest, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    cache: ClaaCache | None = None,
    mask: Tensor | None = None,
    steps: int = 6,
    **settings,
) -> tuple[Tensor, Tensor]:
    """New tokens [B, steps] and their logits [B, steps, vocabulary]."""
    output = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def decoded(model: PreTrainedModel, prefilled: Prefilled, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Logits [B, steps, vocabulary] of greedy decoding, and the tokens [B, steps]."""
    logits, feed = [prefilled.logits], prefilled.logits.argmax(-1, keepdim=True)
    new, position, mask = [feed], prefilled.next_position[:, None], prefilled.attention_mask
    with torch.no_grad():
        for _ in range(steps - 1):
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits.append(
                model(
                    feed,
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=prefilled.cache,
                ).logits[:, -1]
            )
            feed, position = logits[-1].argmax(-1, keepdim=True), position + 1
            new.append(feed)
    return torch.stack(logits, dim=1), torch.cat(new, dim=1)
