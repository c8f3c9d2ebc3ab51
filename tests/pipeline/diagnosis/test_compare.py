"""Comparing two stall reports: what counts as a regression, what is noise, and what else differs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from pipeline.diagnosis.compare import check_report, compare, format_comparison
from pipeline.profiling.confidence import t_interval
from pipeline.profiling.difference import Spread, change_interval, spread_of_interval, spread_of_values


def report(
    supply: float = 3000.0, demand: float = 2000.0, together: float = 1900.0, noise: float = 0.01, rounds: int = 5
) -> dict[str, Any]:
    """A stall report whose rounds vary by `noise`."""
    shifts = noise * np.linspace(-1, 1, rounds)
    interval = t_interval([together / demand * (1 + shift) for shift in shifts])
    figures = {"supply": supply, "demand": demand, "together": together}
    return {
        **figures,
        "au": together / demand,
        "parts": {"decode": 1 - together / demand},
        "verdict": "compute-bound",
        "cause": {"name": "none", "because": "AU reaches the threshold"},
        "actions": [],
        "au_interval": vars(interval),
        "rounds_img_s": {name: [value * (1 + shift) for shift in shifts] for name, value in figures.items()},
        "environment": {"settings": {"threads": 3}, "machine": {"cores": 2}, "versions": {"torch": "2.13"}},
        "storage": {"cached_share": 1.0},
    }


def test_a_report_is_no_regression_of_itself():
    found = compare(report(), report())
    assert found.regressions == [] and found.surroundings == {} and found.texts == {}
    assert all(one.change == 0 and one.within_noise for one in found.figures.values())
    assert "no regression" in format_comparison(found)


@pytest.mark.parametrize("name", ["supply", "together"])
def test_a_decline_beyond_the_tolerance_is_a_regression(name: str):
    before = report()
    assert name in compare(before, report(**{name: 0.9 * before[name]})).regressions
    assert compare(before, report(**{name: 0.9 * before[name]}), tolerance=0.15).regressions == []
    assert compare(before, report(**{name: 1.1 * before[name]})).regressions == []
    assert compare(before, report(demand=1.9e3)).regressions == []  # demand is the trainer's: it does not count


def test_a_decline_that_the_rounds_do_not_show_is_noise():
    noisy = [report(noise=0.3), report(noise=0.3, supply=2700.0)]
    (before, after) = noisy
    change = compare(before, after).figures["supply"]
    assert change.change == pytest.approx(-0.1) and change.within_noise and not change.regression
    assert "hidden by noise: a decline of supply; measure longer" in format_comparison(compare(before, after))
    assert "hidden" not in format_comparison(compare(before, after, tolerance=0.2))
    for one in noisy:
        del one["rounds_img_s"]  # without rounds the figure alone decides
    change = compare(before, after).figures["supply"]
    assert change.within_noise is None and change.regression


def test_a_faster_step_that_lowers_au_is_no_regression():
    faster = report(demand=2600.0, together=2100.0)
    found = compare(report(), faster)
    assert found.figures["au"].change < -0.1 and found.regressions == []
    assert "au" in compare(report(), report(demand=2600.0)).regressions  # here training itself gained nothing


def test_the_interval_of_together_is_that_of_the_run_if_the_windows_do_not_explain_it():
    """The rounds then say nothing of `together`, which is the run's."""
    own = report(noise=0.001) | {"run": {"explained": False}}
    own["au_interval"] = vars(t_interval([0.5, 0.8, 1.1]))
    assert compare(own, report(noise=0.001, together=1700.0)).figures["together"].within_noise
    explained = own | {"run": {"explained": True}}
    assert not compare(explained, report(noise=0.001, together=1700.0)).figures["together"].within_noise


def test_everything_else_that_differs_is_named():
    after = copy.deepcopy(report())
    after["environment"]["settings"]["threads"] = 2
    after["environment"]["versions"] = {"torch": "2.14"}
    after["environment"]["step"] = {"precision": "tf32"}
    after["verdict"], after["cause"] = "input-bound: decode", {"name": "few threads", "because": "2 threads"}
    after["actions"] = [{"text": "--threads 3"}]
    after["storage"]["cached_share"] = 0.3
    after["host"] = {"available_bytes": 1, "waiting_shares": {"io": 0.5}}  # measurements: they always differ
    found = compare(report(), after)
    assert found.surroundings == {
        "environment.settings.threads": (3, 2),
        "environment.versions.torch": ("2.13", "2.14"),
        "environment.step.precision": ("not recorded", "tf32"),
        "storage.cached_share": (1.0, 0.3),
    }
    assert found.texts == {
        "verdict": ("compute-bound", "input-bound: decode"),
        "cause": ("none", "few threads"),
        "first action": ("none", "--threads 3"),
    }
    text = format_comparison(found)
    assert "environment.settings.threads: 3, now 2" in text and "few threads" in text


def test_a_report_of_the_loader_alone_is_compared_by_its_supply():
    alone = {"supply": 2500.0}
    found = compare(report(), alone)
    assert list(found.figures) == ["supply"] and found.regressions == ["supply"] and not found.parts
    assert "only the loader alone" in format_comparison(found)


@pytest.mark.parametrize("wrong", [[], {}, {"supply": "fast"}, {"supply": float("nan")}, {"supply": 1, "au": -1}])
def test_other_json_is_refused(wrong: object):
    with pytest.raises(ValueError, match=r"x\.json: .*expected what train\.py writes"):
        check_report(wrong, "x.json")


def test_the_interval_holds_the_true_change_as_often_as_it_says():
    """Over many pairs of measurements with known means, spreads and numbers of rounds."""
    random, held = np.random.default_rng(0), 0
    for _ in range(1000):
        a, b = random.normal(100, 2, 5), random.normal(90, 4, 8)
        low, high = change_interval(b.mean() / a.mean() - 1, spread_of_values(a), spread_of_values(b))
        held += low <= -0.1 <= high
    assert 0.93 < held / 1000 < 0.97


def test_an_interval_gives_the_spread_that_made_it():
    values = [0.9, 0.92, 0.97, 0.95]
    direct, back = spread_of_values(values), spread_of_interval(**vars(t_interval(values)))
    assert back.freedom == direct.freedom and back.relative_error == pytest.approx(direct.relative_error)
    assert change_interval(-0.1, Spread(0.0, 4), Spread(0.0, 4)) == (-0.1, -0.1)
