"""Methods inside the decoders of Hugging Face transformers, without a copy of any of them."""
