"""The warning about a loss at chance, on simulated series of losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from model.changes import CHANGES
from tools.shared.chance import PATIENCE_STEPS, ChanceWatch, is_at_chance
from tools.shared.learning_rows import ROWS

EVERY = 20  # optimizer steps between two lines of metrics


def warnings(loss_at: Callable[[int], float], steps: int, classes: int = 10) -> list[tuple[int, str]]:
    """(step, text) of each warning in a run whose loss is a function of the step."""
    watch = ChanceWatch(classes)
    found = ((step, watch.warning(step, loss_at(step))) for step in range(EVERY, steps + 1, EVERY))
    return [(step, text) for step, text in found if text]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_run_at_chance_is_warned_about_once(classes: int):
    """After `PATIENCE_STEPS` steps, with the loss of guessing in the message; a loss above it is no better."""
    for worse in (1.0, 1.2):
        chance = math.log(classes)
        ((step, text),) = warnings(
            lambda step, worse=worse, chance=chance: worse * chance, 10 * PATIENCE_STEPS, classes
        )
        assert step == PATIENCE_STEPS + EVERY  # counted from the first line
        assert text.startswith(f"the loss has been at chance (ln {classes} = {chance:.2f}) for {PATIENCE_STEPS:,} ")
        assert "docs/training.md" in text


def test_a_run_that_learns_is_not_warned_about():
    """Neither one that leaves the plateau in time, nor one that comes back to it for a while."""
    leaves = PATIENCE_STEPS - EVERY
    assert not warnings(lambda step: 2.3 if step < leaves else 2.2, 10 * PATIENCE_STEPS)
    assert not warnings(lambda step: 2.2 if step % PATIENCE_STEPS == 0 else 2.4, 10 * PATIENCE_STEPS)
    assert not warnings(lambda step: 0.0, 10 * PATIENCE_STEPS, classes=1)


def test_a_run_that_collapses_is_warned_about():
    """It learns first, and is at chance from step 5,000 on."""
    ((step, _),) = warnings(lambda step: 1.5 if step <= 5000 else 2.3026, 5000 + 2 * PATIENCE_STEPS)
    assert step == 5000 + PATIENCE_STEPS


def test_chance_is_the_loss_of_equal_probabilities():
    assert is_at_chance(math.log(10), 10)
    assert not is_at_chance(0.97 * math.log(10), 10)


def test_every_change_has_a_row_or_is_used_by_all():
    """The table covers all changes."""
    in_rows = {row.partition("+")[2] for row in ROWS} - {""}
    assert in_rows | {"constant-lr", "bias-lr-2x"} >= set(CHANGES) - {"lighting-source2012"}
    assert in_rows <= set(CHANGES)
