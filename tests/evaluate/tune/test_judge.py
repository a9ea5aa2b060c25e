"""What is said of a setting, and which is chosen."""

import math
from dataclasses import replace

import pytest

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.tune.judge import ENOUGH, SOME, Aim, Score, choose, judge
from claa_ops.methods import Peak

CELL = Cell.of("peak", Peak(layer=3, keep=0.1))
RIGHT, WRONG = Score(1.0, 0.8), Score(0.0, 0.1)
AIM = Aim(0.99, 0.95)


def scores(**tasks):
    """For each task its scores in order."""
    return {(task, str(i)): one for task, row in tasks.items() for i, one in enumerate(row)}


def verdict(own, full, tasks=("a", "b"), work=0.3):
    return judge(CELL, work, own, full, tasks)


def test_the_ratio_is_that_of_sums_over_the_same_prompts():
    full = scores(a=[RIGHT, RIGHT, RIGHT], b=[RIGHT, WRONG], c=[WRONG])
    own = scores(a=[RIGHT, WRONG], b=[RIGHT, RIGHT], c=[RIGHT])
    found = verdict(own, full)
    assert found.prompts == 4  # the third of a was not tried, c does not count
    assert found.ratio == pytest.approx((0.9 + 0.05 + 0.9 + 0.9) / (0.9 + 0.9 + 0.9 + 0.05))
    assert found.right == pytest.approx(3 / 3)
    assert found.tasks == pytest.approx({"a": 0.95 / 1.8, "b": 1.8 / 0.95})
    assert found.worst == ("a", pytest.approx(0.95 / 1.8))
    assert found.low < found.ratio < found.high


def test_full_prefill_against_itself_is_one_without_doubt():
    full = scores(a=[RIGHT] * 8 + [WRONG], b=[WRONG] * 3)
    found = verdict(full, full)
    assert (found.ratio, found.low, found.high, found.right) == (1, 1, 1, 1)
    assert (found.worst_low, found.worst_high) == (1, 1)


def test_more_prompts_narrow_the_interval():
    few, many = (
        verdict(scores(a=[RIGHT, RIGHT, WRONG] * n), scores(a=[RIGHT] * 3 * n)) for n in (2, 40)
    )
    assert few.ratio == pytest.approx(many.ratio)
    assert few.low < many.low < many.ratio < many.high < few.high


def test_a_setting_of_which_nothing_is_known_has_no_ratio():
    found = verdict(scores(a=[WRONG]), scores(a=[Score(0.0, 0.0)]))
    assert math.isnan(found.ratio) and not found.fails(AIM) and not found.reaches(AIM)
    assert verdict({}, {}).prompts == 0


def test_what_fails_and_what_reaches_the_aim():
    full = scores(a=[RIGHT] * ENOUGH, b=[RIGHT] * ENOUGH)
    same = verdict(full, full)
    assert same.reaches(AIM) and same.holds(AIM) and not same.fails(AIM)
    few = replace(same, prompts=ENOUGH - 1)
    assert few.holds(AIM) and not few.reaches(AIM)
    assert not replace(same, prompts=SOME - 1).holds(AIM)
    lost = verdict(scores(a=[RIGHT] * ENOUGH, b=[WRONG] * ENOUGH), full)
    assert lost.fails(AIM) and not lost.holds(AIM)
    # A task that is lost is not outweighed by others, nor wrong answers by sure ones.
    sure = Score(1.0, 1.0)
    one = verdict(scores(a=[sure] * ENOUGH, b=[RIGHT] * (ENOUGH - 4) + [WRONG] * 4), full)
    assert one.ratio > 0.99 and one.worst[1] < 0.95 and not one.reaches(Aim(0.5, 0.95))
    half = verdict(scores(a=[sure] * ENOUGH, b=[RIGHT] * 20 + [WRONG] * 20), full)
    assert half.fails(Aim(0.5, 0.95)) and not half.fails(Aim(0.5, 0.5))
    assert not replace(same, right=0.98).holds(AIM)


def test_one_prompt_does_not_decide():
    tasks = "abcdefghijk"
    full = scores(**{task: [RIGHT] for task in tasks})
    own = {**full, ("c", "0"): WRONG}
    found = verdict(own, full, tasks)
    assert found.worst == ("c", pytest.approx(0.05 / 0.9)) and not found.fails(AIM)
    assert found.worst_high > 0.95 and 0.5 < found.worst_low < 0.9
    again = {**full, **{(task, "0"): WRONG for task in "cdef"}}
    assert verdict(again, full, tasks).fails(AIM)


def test_only_prompts_that_both_answered_count():
    full = scores(a=[RIGHT] * 3)
    found = verdict(scores(a=[RIGHT] * 2 + [WRONG] * 9), full)
    assert found.prompts == 3 and found.ratio == pytest.approx((0.9 + 0.9 + 0.05) / 2.7)


def test_the_cheapest_that_reaches_the_aim_is_chosen_else_the_best():
    full = scores(a=[RIGHT] * ENOUGH)
    good, lossy, bad = (
        verdict(scores(a=[RIGHT] * (ENOUGH - lost) + [WRONG] * lost), full) for lost in (0, 1, 20)
    )
    dear, cheap = replace(good, work=0.5), replace(good, work=0.4)
    assert choose([bad, lossy, cheap, dear], AIM) == (cheap, True)
    assert choose([bad, lossy], AIM) == (lossy, False)
    near = replace(lossy, work=0.1, low=lossy.low - 0.01)
    assert choose([near, lossy], AIM) == (near, False)
    below = replace(near, low=lossy.low - 0.03)
    assert choose([below, lossy], AIM) == (lossy, False)


def test_the_worst_task_counts_as_the_mean_does():
    full = scores(a=[RIGHT] * 20, b=[RIGHT] * 20)
    spread = verdict(scores(a=[RIGHT] * 18 + [WRONG] * 2, b=[RIGHT] * 18 + [WRONG] * 2), full)
    one = verdict(scores(a=[RIGHT] * 20, b=[RIGHT] * 16 + [WRONG] * 4), full)
    assert spread.ratio == pytest.approx(one.ratio)
    spread, one = replace(spread, work=0.4), replace(one, work=0.3)
    assert one.worst_low < spread.worst_low - 0.03
    assert choose([one, spread], Aim(0.9, 0.95)) == (spread, False)


def test_a_few_lucky_prompts_are_not_the_best():
    full = scores(a=[RIGHT] * 2 * SOME)
    lucky = verdict(scores(a=[Score(1.0, 1.0)] * (SOME - 1)), full)
    known = verdict(scores(a=[RIGHT] * (2 * SOME - 1) + [WRONG]), full)
    assert lucky.low > known.low
    assert choose([lucky, known], AIM) == (known, False)
    assert choose([lucky], AIM) == (lucky, False)
