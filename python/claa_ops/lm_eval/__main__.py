"""lm-eval's command; importing this package has registered our model class."""

from lm_eval.__main__ import cli_evaluate

cli_evaluate()
