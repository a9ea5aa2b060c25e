"""Published numbers of the methods other than CLAA."""

import pytest
import torch

from claa_ops import prefill, rank_variance
from claa_ops.huggingface.answer import Answer, pool
from claa_ops.methods import ASL, FastKV, GemFilter, Oracle, SpeculativePrefill
from support.vectors import LAYERS, TOKENS, run, vector_key, vector_query

FASTKV = [
    0.723413, 1.104304, 1.130423, 1.120629, 1.103127, 1.102082,
    1.123713, 1.115903, 1.106938, 1.110394, 1.117751, 0.746508,
]  # fmt: skip
GEMFILTER = [
    -0.353682, -0.092014, -0.075453, -0.202084, 0.046682, 0.275771, -0.061593, -0.303569,
    0.150988, 0.249264, -0.272162, -0.066742, 0.287072, -0.167049, -0.264036, -0.002571,
]  # fmt: skip
ORACLE = [
    0.048068, 0.064871, 0.081259, 0.080937, 0.081364, 0.081870, 0.081403, 0.080827,
    0.081602, 0.081876, 0.080887, 0.080861, 0.081575, 0.080789, 0.064281, 0.048561,
]  # fmt: skip
SPECULATIVE = [
    0.041279, 0.051707, 0.064377, 0.064178, 0.066726, 0.068185, 0.066521, 0.065526,
    0.067950, 0.067862, 0.065337, 0.066781, 0.067843, 0.065059, 0.052541, 0.038474,
]  # fmt: skip
ASL_RANKS = [
    [12, 10, 9, 2, 1, 7, 8, 3, 4, 6, 5, 11],
    [12, 10, 5, 1, 4, 9, 7, 2, 6, 8, 3, 11],
    [12, 8, 1, 3, 9, 10, 2, 5, 7, 6, 4, 11],
]


def test_fastkv():
    state, cached = run(FastKV(keep=9, keep_kv=7, layer=2, window=4, kernel_size=3))
    assert state.importance[0].tolist() == pytest.approx(FASTKV, abs=2e-6)
    assert cached[0].tolist() == [[2, 6, 10, 12, 13, 14, 15], [2, 3, 6, 12, 13, 14, 15]]
    assert state.select(2)[0].tolist() == [2, 3, 6, 7, 10, 12, 13, 14, 15]


def test_gemfilter():
    state, cached = run(GemFilter(keep=6, layer=1), layers=2)
    assert state.importance[0].tolist() == pytest.approx(GEMFILTER, abs=2e-6)
    assert state.select(1)[0].tolist() == [4, 5, 8, 9, 12, 15]
    assert cached.shape == (1, 2, 0)  # the first pass keeps no cache


@pytest.fixture
def answer():
    """Queries of the prompt's last token and of two more."""
    return Answer(
        tokens=torch.zeros(1, 3, dtype=torch.int64),
        queries=[vector_query(layer, (15, 16, 17)) for layer in range(LAYERS)],
        keys=[vector_key(layer) for layer in range(LAYERS)],
        scales=[None] * LAYERS,
        votes=torch.ones(1, 3),
        start=None,
        work=0,
    )


def test_oracle(answer):
    ranking = pool(answer.peak(), 5)
    assert ranking[0].tolist() == pytest.approx(ORACLE, abs=2e-6)
    assert ranking[0].topk(5).indices.sort().values.tolist() == [5, 6, 8, 9, 12]
    # Pruned by it: the best of the context, in the selection and for all heads alike.
    state, cached = run(Oracle(keep=7, layer=2, window=4), ranking=ranking)
    assert state.importance.shape == (1, 12)
    assert cached[0].tolist() == [[5, 8, 9, 12, 13, 14, 15]] * 2
    assert state.select(2)[0].tolist() == [5, 8, 9, 12, 13, 14, 15]


def test_speculative_prefill(answer):
    method = SpeculativePrefill(keep=0.3, chunk=4, kernel_size=5)
    ranking = method.rank_prompt(answer)
    assert ranking[0].tolist() == pytest.approx(SPECULATIVE, abs=2e-6)
    state = prefill.begin(
        method, num_layers=LAYERS, prompt_length=TOKENS, ranking=ranking, first_pass=True
    )
    assert state.choose()[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert state.length == 8


def test_a_last_short_chunk_counts_by_its_own_length():
    ranking = torch.zeros(1, TOKENS)
    ranking[0, 14:] = 0.5  # of 16 tokens in chunks of 7, the last has 2
    ranking[0, :7] = 0.4
    method = SpeculativePrefill(keep=7, chunk=7)
    state = prefill.begin(
        method, num_layers=LAYERS, prompt_length=TOKENS, ranking=ranking, first_pass=True
    )
    assert state.choose()[0].tolist() == [14, 15]


def test_asl():
    method = ASL(keep=8, layer=1, last_n=2, tau=0.9, window=4, kernel_size=3)
    ranks = []
    for layers in (1, 2, 3):
        state, _ = run(method, layers=layers)
        order = state.importance[0].argsort(descending=True, stable=True)
        ranks.append((order.argsort() + 1).tolist())
    assert ranks == ASL_RANKS
    assert state.notes["variance"] == pytest.approx(0.95)
    later = rank_variance(torch.stack(state.notes["layers"]), 4).item()
    assert later == pytest.approx(10 / 3)
    assert later / state.notes["variance"] == pytest.approx(3.508772)
    assert state.select(2) is None  # 3.5 is not below 0.9


@pytest.mark.parametrize(("tau", "selects_at"), [(1.01, 1), (1.0, None), (3.6, 1), (None, 1)])
def test_the_first_tested_layer_is_its_own_measure(tau, selects_at):
    method = ASL(keep=8, layer=1, last_n=2, tau=tau, window=4, kernel_size=3)
    state, _ = run(method, layers=2)
    assert state.notes.get("selected") == selects_at
    kept = state.select(1)
    best = [j for j in range(12) if ASL_RANKS[1][j] <= 4]  # of this layer alone
    assert kept is None if selects_at is None else kept[0].tolist() == [*best, 12, 13, 14, 15]
