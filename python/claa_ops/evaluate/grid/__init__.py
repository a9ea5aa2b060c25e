"""Many prompts with every method, layer and rate: ``claa-ops evaluate``."""
