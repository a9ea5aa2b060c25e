"""What a method answers and saves, measured against full prefill."""

from claa_ops._extras import require

require("cli", "transformers", "matplotlib", "rich", "scipy")
