import pytest
from convergence_tools import curve, decay

from stillhouse.analysis.convergence import Comparison, SpeedUp, convergence_markdown, convergence_text, format_speed_up
from stillhouse.analysis.curves import Cost

BASE = [curve("base", decay(0.3, floor=0.1), every=1309, seed=s) for s in range(2)]
FAST = [curve("fast", decay(0.3, floor=0.1), seed=s) for s in range(2)]


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_one_group_has_one_table():
    table = convergence_text(Comparison(tuple(BASE), "base"))
    heading, header, rule, row = table.splitlines()
    assert heading.startswith("Convergence of fid_digits_2k (ema_10kimg): medians over seeds")
    assert cells(header) == ["group", "seeds", "kimg between", "best", "at update", "final", "spread of last third"]
    assert cells(row) == ["base", "0, 1", "20.9", "0.1002", "39,270", "0.1002", "0.002312"]
    assert len(rule) == len(header) == len(row)


def test_costs_and_speed_ups():
    curves, costs, speeds = convergence_text(Comparison((*BASE, *FAST), "base")).split("\n\n")
    assert [cells(line)[0] for line in curves.splitlines()[3:]] == ["base (baseline)", "fast"]
    assert cells(costs.splitlines()[1]) == ["threshold", "group", "seeds there", "updates", "kimg", "seconds"]
    first, second = (cells(line) for line in costs.splitlines()[3:5])
    assert first == ["0.1002 (best)", "base", "2 of 2", "39,270", "628", "19,635"]
    assert second == ["0.1002 (best)", "fast", "2 of 2", "3,000", "48", "1,500"]
    assert "Times faster than base" in speeds
    body = [cells(line) for line in speeds.splitlines()[-3:]]
    assert [row[0].split(" ", 1)[1] for row in body] == ["(best)", "(best + 5%)", "(best + 20%)"]
    assert all(row[1:] == ["fast", *["13.1x (13.1 .. 13.1)"] * 3] for row in body)


def test_groups_with_a_preparation_have_rows_with_and_without_it():
    prepared = curve("fast", decay(0.3, floor=0.1), preparation=Cost(600, 9600, 12.5))
    _, costs, speeds = convergence_text(Comparison((BASE[0], prepared), "base")).split("\n\n")
    assert [cells(line)[1] for line in costs.splitlines()[3:6]] == ["base", "fast", "fast + preparation"]
    assert cells(costs.splitlines()[5])[3:] == ["3,600", "57.6", "1,512"]
    assert [cells(line)[1:3] for line in speeds.splitlines()[4:6]] == [
        ["fast", "13.1x"],
        ["fast + preparation", "10.9x"],
    ]


@pytest.mark.parametrize(
    ("pairs", "shown"),
    [
        ([(30, 20)], "1.50x"),
        ([(1309, 100), (100, 10), (2000, 100)], "13.1x (10.0 .. 20.0)"),
        ([(123456, 1000), (1, 1000)], "61.7x (0.00100 .. 123)"),
        ([(30, 10), (None, 10), (20, 10)], "3.00x (2.00 .. ∞)"),
        ([(30, 10), (40, None), (20, 10)], "2.00x (0 .. 3.00)"),
        ([(30, None), (None, None), (20, 10)], "not reached (2 of 3 seeds)"),
        ([(None, 10), (None, 10), (20, 10)], "baseline not reached (2 of 3 seeds)"),
        ([(None, None)], "not reached (1 of 1 seeds)"),
        ([], "no seed in common"),
    ],
)
def test_a_speed_up_in_words(pairs, shown):
    numbered = tuple((seed, *pair) for seed, pair in enumerate(pairs))
    assert format_speed_up(SpeedUp("fast", 1.0, "updates", False, numbered)) == shown


def test_what_was_not_reached_has_no_cost():
    _, costs, speeds = convergence_text(Comparison((BASE[0], curve("slow", [9.0, 8.0])), "base")).split("\n\n")
    assert cells(costs.splitlines()[4])[1:] == ["slow", "0 of 1", *["not reached"] * 3]
    assert cells(speeds.splitlines()[-1])[1:] == ["slow", *["not reached (1 of 1 seeds)"] * 3]


def test_notes_say_what_the_numbers_do_not():
    fast = curve("fast", [0.1, 0.1], seed=1)
    notes = convergence_text(Comparison((*BASE, fast), "base", ("told",))).split("\n\n")[3:]
    assert notes == [
        "note: told",
        "note: fast was at 1x, 1.05x, 1.2x by its first two measurements and may have been earlier: "
        "lower evaluation.training.every_kimg to see",
        "note: fast and base do not share the seeds 0, which make no pair",
    ]


def test_markdown_has_the_same_cells():
    comparison = Comparison((*BASE, *FAST), "base", ("told",))
    rows = [
        line.strip("| ").split(" | ") for line in convergence_markdown(comparison).splitlines() if line.startswith("| ")
    ]
    plain = [cells(line) for line in convergence_text(comparison).splitlines()]
    assert all(row in plain or set(row) <= {"---", "---:"} for row in rows)
    assert len(rows) == 4 + 8 + 5
    assert convergence_markdown(comparison).endswith("\n\n- told")
