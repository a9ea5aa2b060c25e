"""Two prefills of one prompt side by side: ``claa-ops generate`` and ``claa-ops demo``."""
