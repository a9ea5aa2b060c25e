from dataclasses import dataclass

from claa_ops.selection.method import Method


@dataclass(frozen=True)
class FullKV(Method):
    """Keeps every token everywhere: the plain model, and the baseline of every comparison.

    With ``keep_scores`` a prefill records how each layer ranks the whole prompt, undisturbed by
    any selection.

    Example:
        >>> from claa_ops import prefill
        >>> state = prefill.begin(FullKV(), num_layers=32, prompt_length=4096)
    """
