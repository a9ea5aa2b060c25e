"""The command ``claa-ops``, also as ``python -m claa_ops``."""

import sys

from claa_ops._extras import MissingExtra
from claa_ops.info import print_facts, print_version


def main() -> None:
    """Run the command line; where its extra is missing, ``info`` and ``--version`` still work."""
    try:
        from claa_ops.cli import app
    except MissingExtra as error:
        arguments = sys.argv[1:]
        if arguments == ["--version"]:
            print_version()
        elif arguments in (["info"], ["info", "--json"]):
            print_facts(as_json="--json" in arguments)
        else:
            print(f"claa-ops: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        app()


if __name__ == "__main__":
    main()
