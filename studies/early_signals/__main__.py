"""python -m studies.early_signals: try early signals on needle prompts, and tabulate them."""

from studies.early_signals import coarse, signals
from studies.early_signals.laboratory import main

main({**signals.TRIED, **coarse.TRIED})
