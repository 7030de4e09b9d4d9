"""Crossings and speed-ups of curves that are known by hand."""

import math
from dataclasses import replace

import pytest
from convergence_tools import BATCH, curve, decay

from stillhouse.analysis.convergence import Comparison
from stillhouse.analysis.curves import COST_UNITS, Cost, trailing_median


def compared(*curves, baseline="base"):
    return Comparison(tuple(curves), baseline)


def cost(updates, pace=0.5):
    return Cost(updates, BATCH * updates, pace * updates)


def test_smoothing_is_the_trailing_median_of_three():
    assert trailing_median([9, 5, 7, 1, 6, 2]) == (math.inf, 9, 7, 5, 6, 2)
    for values in ([3, 1, 2], decay(0.1, 9)):
        for threshold in values:  # at or below it exactly where two of the last three values are
            counts = [sum(v <= threshold for v in values[max(0, i - 2) : i + 1]) for i in range(len(values))]
            assert [v <= threshold for v in trailing_median(values)] == [count >= 2 for count in counts]


def test_one_lucky_measurement_does_not_count():
    values = [9, 8, 1, 7, 6, 5, 3, 3, 4]
    lucky = curve("base", values)
    assert lucky.crossing(3) == cost(800)
    assert lucky.crossing(1) is None
    assert lucky.best == (3, cost(800))
    assert lucky.spread == 1  # of 3, 3, 4


def test_thresholds_are_the_median_over_seeds_of_the_baselines_best():
    curves = [curve("base", [9, best, best], seed=seed) for seed, best in enumerate((3.0, 1.0, 2.0))]
    assert compared(*curves, curve("other", [0.1] * 3)).thresholds == {1.0: 2.0, 1.05: 2.1, 1.2: 2.4}


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.2])
def test_the_same_values_at_updates_13_09_times_as_far_apart(factor):
    comparison = compared(curve("base", decay(0.3), every=1309), curve("fast", decay(0.3), every=100))
    for currency in COST_UNITS:
        assert comparison.speed_up("fast", factor, currency).median == pytest.approx(13.09, rel=1e-12)


def test_exponential_decays_cross_where_the_logarithm_says():
    """At rates 0.1 and 0.4 in 30 measurements: the threshold is exp(-0.1 * 28), times the factor."""
    comparison = compared(curve("base", decay(0.1)), curve("fast", decay(0.4)))
    best = math.exp(-0.1 * 28)  # the last value but one, by the median
    for factor in (1.0, 1.05, 1.2):
        tau = comparison.thresholds[factor]
        assert tau == pytest.approx(factor * best)
        # value i is at or below it from i = ceil(-ln tau / rate); two are one measurement later; the first is at 100
        slow, fast = (100 * (math.ceil(-math.log(tau) / rate - 1e-9) + 2) for rate in (0.1, 0.4))
        assert comparison.crossings("base", factor) == [cost(slow)]
        assert comparison.crossings("fast", factor) == [cost(fast)]
        assert comparison.median_cost("fast", factor) == (fast, BATCH * fast, 0.5 * fast)
        assert comparison.speed_up("fast", factor, "updates").median == pytest.approx(slow / fast)


def test_seconds_have_their_own_speed_up():
    comparison = compared(curve("base", decay(0.3), every=400), curve("fast", decay(0.3), every=100, pace=2.0))
    assert [comparison.speed_up("fast", 1.0, c).median for c in COST_UNITS] == [4.0, 4.0, 1.0]


def test_the_cost_of_the_preparation_can_turn_the_comparison():
    """200 updates after 600 steps of preparation, against 400."""
    base = curve("base", [5.0, 5, 1, 1])
    fast = curve("fast", [1.0, 1, 1, 1], preparation=Cost(600, 100, 900.0))
    comparison = compared(base, fast)
    assert comparison.prepared
    assert not compared(base, replace(fast, preparation=Cost())).prepared
    assert fast.crossing(1.0, prepared=True) == cost(200) + Cost(600, 100, 900.0)
    assert [comparison.speed_up("fast", 1.0, c).median for c in COST_UNITS] == [2.0, 2.0, 2.0]
    prepared = [comparison.speed_up("fast", 1.0, c, prepared=True).median for c in COST_UNITS]
    assert prepared == [0.5, 400 * BATCH / (200 * BATCH + 100), 0.2]


def three(group, costs):
    """Curves of seeds 0, 1, 2 that are at 1 from that measurement (of 6) on; None: never."""
    return [curve(group, [9.0 if at is None or i + 2 < at else 1.0 for i in range(6)], seed=seed) for seed, at in costs]


def speed_up(base, fast):
    return compared(*three("base", enumerate(base)), *three("fast", enumerate(fast))).speed_up("fast", 1.0, "updates")


def test_the_median_over_three_seeds():
    found = speed_up((6, 6, 4), (2, 3, 4))
    assert found.pairs == ((0, 600, 200), (1, 600, 300), (2, 400, 400))
    assert found.ratios == [3, 2, 1]
    assert found.median == 2


def test_what_was_not_reached_stays_in_the_median():
    one = speed_up((6, 6, 4), (2, None, 4))
    assert (one.ratios, one.median, one.not_reached) == ([3, 0, 1], 1, 1)
    two = speed_up((6, 6, 4), (2, None, None))
    assert (two.median, two.not_reached) == (0, 2)
    baseline = speed_up((6, None, 4), (2, 3, 4))
    assert (baseline.ratios, baseline.median, baseline.baseline_not_reached) == ([3, math.inf, 1], 3, 1)
    both = speed_up((6, None, 4), (2, None, 4))  # counts against the group, whatever the baseline did
    assert (both.ratios, both.not_reached, both.baseline_not_reached) == ([3, 0, 1], 1, 0)


def test_half_of_two_seeds_not_reached_is_no_number():
    assert speed_up((6, 4), (2, None)).median == 0
    base = [*three("base", enumerate((3, 3, None)))]
    fast = [*three("fast", [(1, 3), (2, 3)])]
    assert compared(*base, *fast).speed_up("fast", 1.0, "updates").median == math.inf


def test_only_seeds_in_both_groups_make_pairs():
    comparison = compared(*three("base", enumerate((4, 6, 6))), *three("fast", [(3, 2), (1, 2)]))
    assert comparison.speed_up("fast", 1.0, "updates").pairs == ((1, 600, 200),)
    apart = compared(*three("base", [(0, 4)]), *three("fast", [(1, 2)])).speed_up("fast", 1.0, "updates")
    assert (apart.pairs, apart.median) == ((), None)


def test_a_summary_is_the_median_over_seeds():
    comparison = compared(*(curve("base", [9, 9, b, b, b, b + 0.5], seed=b, every=10) for b in (1, 2, 4)))
    summary = comparison.summary("base")
    assert (summary.seeds, summary.best, summary.final, summary.spread) == ((1, 2, 4), 2, 2, 0.5)  # both smoothed
    assert (summary.best_updates, summary.every) == (40, 10 * BATCH)


def test_groups_begin_with_the_baseline_and_go_by_seed():
    comparison = compared(*three("fast", [(1, 2), (0, 2)]), *three("base", [(1, 4), (0, 4)]))
    assert [(label, [c.seed for c in cs]) for label, cs in comparison.groups.items()] == [
        ("base", [0, 1]),
        ("fast", [0, 1]),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: compared(curve("base", [1, 1], metric="fid_a"), curve("b", [1, 1])),
            "different metrics.*fid_a, fid_d",
        ),
        (lambda: compared(), "different metrics can't be compared: none"),
        (lambda: compared(curve("a", [1, 1])), "no curve of the baseline base; there are a"),
        (lambda: compared(curve("base", [1, 1]), curve("base", [2, 2])), "same seed; name one of them"),
        (lambda: curve("base", [1]), "base-seed0: a curve takes two or more finite values"),
        (lambda: curve("base", [1, math.nan, 1]), "a curve takes two or more finite values"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
