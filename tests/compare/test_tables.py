import csv

import pytest

from lightning_feat.compare.effects import Effect, Question, effects_of
from lightning_feat.compare.statistics import Interval
from lightning_feat.compare.tables import answer, decimals_for, number, result_table, runs_csv
from tests.compare.helpers import run, runs

SHARE = (0.0, 1.0)


def effect(difference, interval, bounds=SHARE, metric="val/accuracy"):
    return Effect("arm", "base", metric, [0, 1], [0.5 + difference] * 2, [0.5, 0.5], interval, bounds=bounds)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (effect(0.0112, Interval(0.001, 0.022)), "higher by 1.1 points [0.1, 2.2]"),
        (effect(-0.0112, Interval(-0.022, -0.001)), "lower by 1.1 points [0.1, 2.2]"),
        (effect(0.0005, Interval(-0.003, 0.004)), "no difference told: between -0.30 and +0.40 points"),
        (effect(0.25, Interval(0.1, 0.4), None), "higher by 0.25 [0.10, 0.40]"),
        (effect(0.0, None), "difference +0 points, no interval"),
        (effect(0.031, None), "difference +3.1 points, no interval"),
    ],
)
def test_the_answer_in_words(made, said):
    assert answer(made) == f"arm, val/accuracy: {said}"


def test_numbers_of_a_table_are_rounded_alike():
    assert [decimals_for(size) for size in (130.0, 13.0, 1.3, 0.13, 0.0)] == [0, 0, 1, 2, 2]
    assert number(-0.004, 2) == "0.00"
    assert number(-0.004, 2, sign=True) == "+0.00"
    assert number(1.23456e-9, 10) == "1.23e-09"


def test_the_table_holds_means_spreads_differences_and_intervals():
    records = runs(base=[0.80, 0.83, 0.81], arm=[0.83, 0.87, 0.84], other=[0.80, 0.84, 0.81])
    question = Question("base", ("val/accuracy",))
    table = result_table(records, effects_of(records, question), question)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == [
        "val/accuracy (%)",
        "runs",
        "mean",
        "spread",
        "difference",
        "95 % interval, joint",
        "seeds to tell",
    ]
    assert rows[2] == ["base", "3", "81.3", "1.5", "", "", ""]
    assert rows[3][:3] == ["arm", "3", "84.7"]
    assert rows[3][4] == "+3.3"
    assert "Bonferroni over 2 arms" in table
    assert "other, val/accuracy: 2 of 3 pairs are ties" in table


def test_runs_csv_has_a_line_for_each_run_with_all_digits():
    records = [run("base", 0, 0.1 + 0.2), run("arm", None, 0.5), run("arm", 1, 0.5, status="failed", error="a, b")]
    rows = list(csv.DictReader(runs_csv(records, ["val/accuracy"]).splitlines()))
    assert float(rows[0]["val/accuracy"]) == 0.1 + 0.2
    assert [row["seed"] for row in rows] == ["0", "", "1"]
    assert (rows[2]["status"], rows[2]["error"]) == ("failed", "a, b")
