"""The adapter: methods inside the decoders of Hugging Face transformers, none of which is copied.

``attach`` installs the hooks (``hooks``) and the attention function (``attention``) of a model,
and ``cache`` carries a request through them. ``prefill`` and ``decoding`` run whole requests,
``replay`` prefills once for many methods, ``answer`` asks a model before a prefill, and ``tuned``
keeps what was found to be good for a model. Only ``transformers_api`` knows transformers'
internals. The public face is :mod:`claa_ops.prefill`.
"""
