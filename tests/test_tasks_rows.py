import numpy as np
import pytest

from cellray.tasks.rows import Result, averaged, refused, rows, verdict

RNG = np.random.default_rng(0)


def values(centre, spread=0.01):
    drawn = RNG.normal(centre, spread, 500)
    return np.concatenate([[centre], drawn])


def test_verdicts_are_of_the_paired_difference():
    shared = RNG.normal(0, 0.05, 501)
    shared[0] = 0
    better, same = 0.82 + shared, 0.8 + shared + RNG.normal(0, 0.02, 501)
    assert verdict("accuracy", better, 0.8 + shared) == "beats"
    assert verdict("accuracy", 0.8 + shared, better) == "loses"
    assert verdict("accuracy", same, 0.8 + shared) == "ties"
    assert verdict("accuracy", better, better) == "ties"


def test_lower_is_better_for_distances():
    assert verdict("foscttm", values(0.1), values(0.4)) == "beats"


def test_the_student_is_judged_against_the_best_baseline_alone():
    results = [
        Result("student", "ours", {"accuracy": values(0.9)}),
        Result("teacher", "reference", {"accuracy": values(0.99)}),
        Result("majority", "baseline", {"accuracy": values(0.3)}),
        Result("MLP", "baseline", {"accuracy": values(0.95)}),
    ]
    found = {row["model"]: row for row in rows("annotation", "d", "split", ["accuracy"], results)}
    assert [found[m]["verdict"] for m in found] == ["loses", "", "baseline", "baseline"]
    assert found["student"]["low"] < 0.9 < found["student"]["high"]
    assert found["student"]["split"] == "split"


def test_what_was_not_run_has_a_reason_and_no_value():
    results = [Result("student", "ours", {"accuracy": values(0.9)}), refused("MLP", "baseline", "no time")]
    ours, other = rows("annotation", "d", "", ["accuracy"], results)
    assert ours["verdict"] == ""
    assert (other["value"], other["low"], other["seeds"]) == (None, None, 0)
    assert other["reason"] == "no time"
    undefined = Result("student", "ours", {"accuracy": np.array([np.nan])})
    assert rows("annotation", "d", "", ["accuracy"], [undefined])[0]["reason"] == (
        "not defined on these cells"
    )


def test_seeds_are_averaged_and_counted():
    found = averaged("MLP", "baseline", [{"accuracy": np.full(3, v)} for v in (0.8, 0.9)])
    assert found.values["accuracy"][0] == pytest.approx(0.85)
    assert found.seeds == 2


def test_calibration_gets_no_verdict():
    results = [
        Result("student", "ours", {"calibration error": values(0.01)}),
        Result("majority", "baseline", {"calibration error": values(0.02)}),
    ]
    assert rows("annotation", "d", "", ["calibration error"], results)[0]["verdict"] == ""
