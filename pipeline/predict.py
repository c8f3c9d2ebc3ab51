"""What a change would bring, by a simple model scaled to what was measured. All rates in img/s.

    supply   = min(1 / storage_s, min(threads, cores) / feed_s)
    together = min(demand, supply, cores / (feed_s + trainer_s))

`feed_s` and `trainer_s` are CPU seconds per image, `storage_s` the seconds per image that reading takes, and `cores`
are those that neighbours leave. A prediction is the measured rate times the model's ratio of after and before, so that
whatever the model leaves out is taken to stay in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

WORTH = 1.02  # a gain of less is not worth a line
# A square set spares half of what its pictures have fewer pixels: entropy decoding goes over whole rows, the rest only
# over the crop. Measured on 500 photographs: 27 % fewer pixels, 0.291 instead of 0.340 CPU ms.
SQUARE_SPARES = 0.5


@dataclass(frozen=True)
class Load:
    """What images cost, and what there is to pay with. `demand` is infinite where nobody trains.

    Seconds are per image: `storage_s` of the clock, the others of CPU time. `area` is the pixels of a stored picture
    over those of its central square, in the mean; `together` was measured. Where `ranks` train together, on so many
    `hosts`, all is of the whole job: rates, threads, cores.
    """

    threads: int
    cores: float
    neighbours: float
    storage_s: float
    read_s: float
    decode_s: float
    augment_s: float
    trainer_s: float
    demand: float
    supply: float
    together: float
    area: float = 1.0
    queue_depth: int = 2
    ranks: int = 1
    hosts: float = 1.0  # of equal numbers of ranks

    @property
    def feed_s(self) -> float:
        """CPU seconds of the feed per image."""
        return self.read_s + self.decode_s + self.augment_s

    @property
    def free(self) -> float:
        """Cores that neighbours leave; a tenth of one at least, or nothing would ever run."""
        return max(0.1, self.cores - self.neighbours)


def limits(load: Load) -> dict[str, float]:
    """What each resource allows by itself, lowest first: the first is the bottleneck, the second comes next."""
    found = {"feed": min(load.threads, load.free) / load.feed_s, "trainer": load.demand}
    if load.storage_s:
        found["storage"] = 1 / load.storage_s
    if load.trainer_s:
        found["shared cores"] = load.free / (load.feed_s + load.trainer_s)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def model_supply(load: Load) -> float:
    """By the model, unscaled."""
    found = limits(load)
    return min(found.get("storage", found["feed"]), found["feed"])


def model_together(load: Load) -> float:
    """By the model, unscaled."""
    return min(limits(load).values())


def predicted_supply(before: Load, after: Load) -> float:
    """The feed alone, once `before` has become `after`."""
    return before.supply * model_supply(after) / model_supply(before)


def predicted_together(before: Load, after: Load) -> float:
    """The real run, once `before` has become `after`: never above the predicted supply, nor the new demand."""
    scaled = before.together * model_together(after) / model_together(before)
    return min(scaled, predicted_supply(before, after), after.demand)


@dataclass(frozen=True)
class Action:
    """A change and what it would bring. `settings` are those of the feed that make it, empty where it takes more than
    settings; `supply` and `together` are predictions."""

    text: str
    settings: dict[str, Any]
    supply: float
    together: float

    def __str__(self) -> str:
        if self.together == float("inf"):
            return f"{self.text}: predicted {self.supply:,.0f} img/s of the feed alone"
        return f"{self.text}: predicted {self.together:,.0f} img/s (the feed alone {self.supply:,.0f})"


def actions(load: Load) -> list[Action]:
    """Changes worth making: settings, which cost nothing, before everything else; then the greatest gain first."""
    found = [_action(load, after, text, settings) for text, settings, after in _changes(load)]
    fitting = load.demand == float("inf")
    now = load.supply if fitting else load.together
    gains = [(action, action.supply if fitting else action.together) for action in found]
    worth = [(action, rate) for action, rate in gains if rate >= WORTH * now]
    return [action for action, _ in sorted(worth, key=lambda pair: (not pair[0].settings, -pair[1]))]


def _action(before: Load, after: Load, text: str, settings: dict[str, Any]) -> Action:
    together = float("inf") if before.demand == float("inf") else predicted_together(before, after)
    return Action(text, settings, predicted_supply(before, after), together)


def _changes(load: Load) -> list[tuple[str, dict[str, Any], Load]]:
    """Everything that could be changed: how it is said, the feed's settings for it, the load after."""
    found: list[tuple[str, dict[str, Any], Load]] = []
    threads = ceil(load.cores / load.ranks)  # of a rank, as the option has it
    if threads * load.ranks > load.threads:
        found.append((f"--threads {threads}", {"threads": threads}, replace(load, threads=threads * load.ranks)))
    if load.area > 1:
        spared = SQUARE_SPARES * (1 - 1 / load.area)
        found.append(("shard with --stored square", {}, replace(load, decode_s=load.decode_s * (1 - spared))))
    if load.storage_s:
        found.append(("a faster disk, or the shards in memory", {}, replace(load, storage_s=0.0)))
    if load.neighbours >= 0.1:
        found.append(("stop what else runs on these cores", {}, replace(load, neighbours=0.0)))
    if load.demand < float("inf"):
        lacking = max(1, ceil(load.demand * (load.feed_s + load.trainer_s) - load.free))
        more = replace(load, cores=load.cores + lacking, threads=load.threads + lacking)
        threads = ceil(more.threads / load.ranks)
        found.append((f"{lacking} more core{'s' * (lacking > 1)}, --threads {threads}", {}, more))
    return found
