"""The tiny model as GGUF files, complete and incomplete in the ways that occur."""

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from support.tiny_checkpoint import CONTEXT, TEMPLATE, tiny_model, tiny_tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_tiny_gguf(
    file: Path,
    model: LlamaForCausalLM | None = None,
    *,
    weights: int | None = None,
    kind: str = "model",
    parts: int | None = None,
    layers: int | None = None,
    rope: str | None = None,
    more: str | None = None,
) -> Path:
    """Write the model with its first ``weights`` alone, as the first of ``parts`` parts.

    The header may state other ``layers`` and a scaling of ``rope``; ``more`` is one more tensor.
    """
    model = model or tiny_model()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(kind)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers if layers is None else layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_chat_template(TEMPLATE)
    if parts is not None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
    if rope is not None:
        writer.add_string("llama.rope.scaling.type", rope)
    if more is not None:
        writer.add_tensor(more, torch.ones(32).numpy())
    for name, weight in list(model.state_dict().items())[:weights]:
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        short = name.partition("self_attn.")[2][:1]
        values = _interleave(weight, heads[short]) if short in heads else weight
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order, in which rotary embeddings rotate neighbouring channels."""
    return (
        weight.view(heads, 2, -1, weight.shape[1])
        .transpose(1, 2)
        .reshape(weight.shape)
        .contiguous()
    )
