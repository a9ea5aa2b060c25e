"""What methods keep right and what they save: a folder for each question.

``compare`` asks it of one prompt, ``grid`` of many, ``oracle`` asks how methods rank, ``tune``
which one a model needs; ``tasks`` has the prompts and grades the answers. ``tune`` has its records
from ``grid``; no other question imports another, what several need lies here.
"""

from claa_ops._extras import require

require("cli", "transformers", "matplotlib", "rich", "scipy")
