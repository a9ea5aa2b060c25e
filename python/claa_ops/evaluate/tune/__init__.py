"""The method, the layer and the budget that a model needs, found on prompts made here."""
