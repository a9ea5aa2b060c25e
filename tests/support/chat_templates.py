"""Short chat templates of the forms that models have, what is said, and tokenizers for both."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Tool definitions at the end of the system prompt.
CHATML = """\
{%- set given = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if given or tools -%}
<|im_start|>system
{{ given }}
{%- if tools %}

# Tools

Call what is between <tools> and </tools>:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>

A call is JSON, with name and arguments.
{%- endif -%}
<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

# A system prompt is always there; tool definitions are in the first message of the user.
LLAMA = """\
{%- macro head(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}
{%- endmacro -%}
<|begin|>{{ head('system') }}Knowledge until: 2023

{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot|>
{%- for message in messages -%}
{%- if message.role != 'system' -%}
{{ head(message.role) }}
{%- if tools and message.role == 'user' and not (loop.index0 - (messages[0].role == 'system')) -%}
Answer by a call of one of these functions, as JSON.

{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor -%}
{%- endif -%}
{{ message.content | trim }}<|eot|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif -%}
"""

# Tool definitions are in front of the last message of the user.
MISTRAL = """\
<s>
{%- for message in messages -%}
{%- if message.role == 'system' -%}
[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]
{%- elif message.role == 'user' -%}
{%- if tools and loop.last -%}
[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
[INST] {{ message.content }}[/INST]
{%- else %} {{ message.content }}</s>
{%- endif -%}
{%- endfor -%}
"""

# The system prompt is in the last message of the user, and nothing is between.
OLD_MISTRAL = """\
<s>
{%- set given = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
[INST] {% if loop.last and given %}{{ given }}{{ '\\n\\n' }}{% endif %}{{ message.content }}[/INST]
{%- elif message.role == 'assistant' %} {{ message.content }}</s>
{%- endif -%}
{%- endfor -%}
"""

# Roles are words.
WORDS = """\
{%- for message in messages -%}
{% if message.role == 'system' %}{{ message.content }}

{% else %}{{ message.role | upper }}: {{ message.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT:{% endif -%}
"""

# No system prompt, no tools.
BARE = """\
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('no system prompts') }}{% endif -%}
<s>{{ message.content }}</s>
{%- endfor -%}
"""

SPECIAL = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    LLAMA: ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot|>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    + ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
    OLD_MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]"],
    WORDS: [],
    BARE: ["<s>", "</s>"],
}

# Punctuation takes the line ends behind it into its token, as in Llama 3's tokenizer and Qwen's.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


# What is said in them.
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "As in }\n\n</tools>[/AVAILABLE_TOOLS"},
        "days": {"type": "object", "properties": {}},
    },
    "required": ["city"],
}
# As requests give them: in this order of keys, with and without parameters.
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "description": 'The "time".'}},
    {"function": {"name": "stop", "parameters": {}}, "type": "function"},
]
HELP = {"role": "system", "content": "You help.\n"}
TURNS = [
    {"role": "user", "content": "What is <tools>\n{} good for, dear USER?"},
    {"role": "assistant", "content": "# Tools\n\nare system or user."},
    {"role": "user", "content": '{"a": 3}, said the user\n\nwhat?'},
]


def chat_tokenizer(template: str, merges: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template; with ``merges``, it has tokens of several bytes.

    Args:
        template: one of this module.
        merges: whether it has; if not, each byte is a token.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200 if merges else 0,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = [*SPECIAL, '"}}\n\n', '."}}}\n', "].\n\n\n", ".\n\n", '}\n\n\n{"', "\n\n\n", "?\n\n"]
    tokenizer.train_from_iterator(text * 3, trainer)
    tokenizer.add_special_tokens(SPECIAL[template])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[template]})
    fast.chat_template = template
    return fast
