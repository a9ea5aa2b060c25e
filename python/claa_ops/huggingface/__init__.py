"""The adapter: methods inside the decoders of Hugging Face transformers, none of which is copied.

``attach`` installs the hooks (``hooks``) and the attention function (``attention``) of a model,
and ``cache`` carries a request through them. ``prefill`` and ``decoding`` run whole requests,
``replay`` prefills once for many methods, and ``answer`` asks a model before a prefill. Only
``transformers_api`` knows transformers' internals. The public face is :mod:`claa_ops.prefill`.
"""
