"""How long the prompts are."""

import pytest

from claa_ops.evaluate.tune.run import doable


@pytest.mark.parametrize(
    ("most", "able", "found"),
    [(3072, 3072, 3072), (3072, 2000, 1536), (3072, 800, 768), (3072, 0, 768), (1600, 0, 800)],
)
def test_prompts_are_as_long_as_the_model_can_do_its_tasks(most, able, found):
    tried = []

    def can_do(length):
        tried.append(length)
        return length <= able

    assert doable(most, can_do) == found
    assert 768 not in tried  # there is nothing shorter to turn to
