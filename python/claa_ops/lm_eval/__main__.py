"""lm-eval's command; importing this package has registered our model class."""

import sys

from lm_eval.__main__ import cli_evaluate

import claa_ops.lm_eval
from claa_ops.huggingface.models import InputError

if {"-h", "--help"} & set(sys.argv):
    print(claa_ops.lm_eval.__doc__)
try:
    cli_evaluate()
except InputError as error:
    print(f"claa-ops: {error}", file=sys.stderr)
    sys.exit(2)
