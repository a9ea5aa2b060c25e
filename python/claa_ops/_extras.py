"""One sentence for a user who lacks the packages of an extra."""

from importlib.util import find_spec


class MissingExtra(ImportError):
    """Packages are missing that an extra of claa-ops installs; the message says which."""


def require(extra: str, *modules: str) -> None:
    """Check that these modules, which ``claa-ops[EXTRA]`` installs, can be imported.

    Raises:
        MissingExtra: one of them is missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"this part of claa_ops needs {' and '.join(missing)}: pip install 'claa-ops[{extra}]'"
        )
