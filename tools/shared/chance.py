"""The loss of guessing, and a warning if a training run does no better for long.

A network that gives every class the same probability has the loss ln(classes). Training starts there, on a plateau that
it must leave. docs/training.md has measurements of what keeps it there.
"""

from __future__ import annotations

import math

AT_CHANCE = 0.98  # of ln(classes): losses above it are no better than guessing
PATIENCE_STEPS = 1000  # optimizer steps; the slowest run of docs/training.md that learnt needed a sixth of them


def is_at_chance(loss: float, classes: int) -> bool:
    """Whether a mean training loss is no better than guessing among `classes`."""
    return loss > AT_CHANCE * math.log(classes)


class ChanceWatch:
    """Notices that the loss has stayed at chance for `PATIENCE_STEPS` optimizer steps.

    Args:
        classes: number of classes; a single one is never at chance.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._last_better: int | None = None  # the last step with a better loss, or the one before the first line
        self._said = classes < 2

    def warning(self, step: int, loss: float) -> str | None:
        """The warning, once, when it is due; otherwise None.

        Args:
            step: optimizer steps so far.
            loss: mean training loss since the last call. Call this after every line of metrics.
        """
        if self._last_better is None or not is_at_chance(loss, self.classes):
            self._last_better = step
            return None
        if self._said or step - self._last_better < PATIENCE_STEPS:
            return None
        self._said = True
        chance = f"the loss has been at chance (ln {self.classes} = {math.log(self.classes):.2f})"
        found = f"{chance} for {step - self._last_better:,} optimizer steps"
        known = "images of unit variance, and small starting weights of conv3 to conv5 (recipe paper)"
        return f"{found}; what kept it there longest in docs/training.md: {known}; wrong labels do so, too"
