"""One sentence for whoever lacks the packages of an extra."""

from importlib.util import find_spec


class MissingExtra(ImportError):
    """Packages are missing that an extra of claa-ops installs; the message says which."""


def require(extra: str, *modules: str) -> None:
    """Go on only where all of these modules are, which ``claa-ops[EXTRA]`` installs.

    Raises:
        MissingExtra: one of them is missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"this part of claa_ops needs {' and '.join(missing)}: pip install 'claa-ops[{extra}]'"
        )
