"""lm-eval's command; importing this package has registered our model class."""

import sys

from lm_eval.__main__ import cli_evaluate

import claa_ops.lm_eval

if {"-h", "--help"} & set(sys.argv):
    print(claa_ops.lm_eval.__doc__)
cli_evaluate()
