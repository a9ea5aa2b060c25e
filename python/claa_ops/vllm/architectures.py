"""The models of vLLM that can have a selection."""

# Our architecture -> module and class of the vLLM model it extends. Their decoder layers have the
# form ``hidden, residual = layer(positions, hidden, residual)``.
ARCHITECTURES = {
    "ClaaLlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "ClaaMistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "ClaaQwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "ClaaQwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
}
