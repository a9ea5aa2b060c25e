"""How far a ranking agrees with the oracle's, and with itself one layer before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from claa_ops.evaluate.intervals import Interval, bootstrap
from claa_ops.ops.select_topk import select_topk

MEASURES = {
    "answers": "right answers with the tokens kept",
    "spearman_raw": "Spearman with the raw oracle",
    "spearman_pooled": "Spearman with the pooled oracle",
    "overlap_raw": "top-k overlap with the raw oracle",
    "overlap_pooled": "top-k overlap with the pooled oracle",
    "needle_recall": "needle tokens in the top k",
    "stability_jaccard": "Jaccard of the top k, layer to layer",
    "stability_spearman": "Spearman, layer to layer",
}


def measure_ranking(
    ranking: Tensor,
    layers: Sequence[int],
    raw: Tensor,
    pooled: Tensor,
    k: int,
    needle: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Compare one method's ranking at each layer with the oracle's.

    Args:
        ranking: ``[L, M]``, float32: the importance of the context tokens at each of L layers.
        layers: which layers these are, ascending.
        raw: ``[M]``, float32: the oracle's importance.
        pooled: ``[M]``, float32: the same, pooled over neighbouring tokens.
        k: how many of the context tokens are the best; ties go to the lower position.
        needle: ``[m]``, int64: the context tokens that hold the answer, where they are known.

    Returns:
        For each key of `MEASURES` but ``answers``, which no ranking tells, one value per layer,
        ``[L]``. A layer without its predecessor
        among ``layers`` has no stability, a constant ranking no rank correlation, and a prompt
        without a known needle no recall: these are NaN.

    Example:
        >>> oracle = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> values = measure_ranking(oracle[None], [7], oracle, oracle.flip(0), k=2)
        >>> [float(values[key][0]) for key in ("spearman_raw", "spearman_pooled", "overlap_raw")]
        [1.0, -1.0, 1.0]
    """
    correlation = _spearman(torch.cat([raw[None], pooled[None], ranking]))
    chosen = _is_among_best(ranking, k)
    common = (chosen[1:] & chosen[:-1]).sum(axis=-1)
    values = {
        "spearman_raw": correlation[0, 2:],
        "spearman_pooled": correlation[1, 2:],
        "overlap_raw": (chosen & _is_among_best(raw, k)).sum(axis=-1) / k,
        "overlap_pooled": (chosen & _is_among_best(pooled, k)).sum(axis=-1) / k,
        "needle_recall": np.full(len(layers), np.nan),
        "stability_jaccard": np.append(np.nan, common / (2 * k - common)),
        "stability_spearman": np.append(np.nan, np.diagonal(correlation[2:, 2:], offset=1)),
    }
    if needle is not None:
        values["needle_recall"] = chosen[:, needle.numpy()].mean(axis=-1)
    first_of_a_run = np.diff(layers, prepend=-np.inf) != 1
    for key in ("stability_jaccard", "stability_spearman"):
        values[key][first_of_a_run] = np.nan
    return values


def intervals(values: np.ndarray) -> list[Interval | None]:
    """Average each column of ``[P, L]`` over the prompts that have it; None where none has."""
    columns = (column[np.isfinite(column)] for column in values.T)
    return [bootstrap([column.tolist()]) if column.size else None for column in columns]


def _spearman(rows: Tensor) -> np.ndarray:
    """Rank correlations of all pairs of rows, ``[R, R]``; of a constant row NaN."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.asarray(stats.spearmanr(rows.double().numpy(), axis=1).statistic)


def _is_among_best(scores: Tensor, k: int) -> np.ndarray:
    """Which entries of each row are its best k, ``[..., M]``, bool."""
    best = torch.zeros_like(scores, dtype=torch.bool)
    return best.scatter_(-1, select_topk(scores, k), True).numpy()
