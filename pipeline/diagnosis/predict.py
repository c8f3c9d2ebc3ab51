"""What a change would bring, by a simple model scaled to what was measured. All rates in img/s.

    supply   = min(1 / storage_s, min(threads, busy(cores)) / feed_s)
    together = min(1 / (1 / demand + between_s + uneven_s), supply, cores / (feed_s + trainer_s))

`feed_s` and `trainer_s` are CPU seconds per image, `storage_s` the seconds per image that reading takes, `between_s`
what passes between steps, `uneven_s` what is waited for although the feed is fast enough in the mean, and `cores` are
those that neighbours leave. A prediction is the measured rate times the model's ratio of after and before, so that
whatever the model leaves out is taken to stay in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

Change = Literal["threads", "queue", "callback", "square", "memory", "disk", "neighbours", "cores"]
ENDS = 0.12  # of the time of many cores: threads wait for one another at the end of each batch
WORTH = 1.02  # a gain of less is not worth a line
# Decoding a crop takes entropy decoding of all rows down to its end, which goes with the picture's width, and the rest,
# which goes with the crop. In units of the former for a square of 256 the latter is, measured on 500 photographs:
CROP_COST = 1.25
COLD = 2.0  # times as fast from memory as from the disk: then the page cache is what is missing
DEEPER = 4  # batches in a queue that was too short
UNEVEN = 0.05  # of the time: waits of so much without need are worth a deeper queue


@dataclass(frozen=True)
class Load:
    """What images cost, and what there is to pay with.

    Seconds are per image: `storage_s` of the clock, from memory `warm_s`; the others of CPU time. `fits`: the set, into
    the memory that is free. `area` is what of a stored picture has to be entropy decoded for a crop, over the same of a
    square of 256, in the mean; `together` was measured. Where `ranks` train together, on so many `hosts`, all is of the
    whole job: rates, threads, cores.
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
    warm_s: float = 0.0
    fits: bool = True
    between_s: float = 0.0
    uneven_s: float = 0.0
    ranks: int = 1
    hosts: float = 1.0  # of equal numbers of ranks

    @property
    def feed_s(self) -> float:
        """CPU seconds of the feed per image."""
        return self.read_s + self.decode_s + self.augment_s

    @property
    def cold(self) -> bool:
        """Whether reading would be much faster from memory."""
        return self.storage_s > COLD * self.warm_s

    @property
    def free(self) -> float:
        """Cores that neighbours leave; a tenth of one at least, or nothing would ever run."""
        return max(0.1, self.cores - self.neighbours)


def busy(cores: float) -> float:
    """Cores in use by more threads than there are: all of one, less of more (measured: 1.88 of 2)."""
    return cores * (1 - ENDS * (1 - 1 / max(1.0, cores)))


def limits(load: Load) -> dict[str, float]:
    """What each resource allows by itself, lowest first: the first is the bottleneck, the second comes next."""
    found = {
        "feed": min(load.threads, load.ranks * busy(load.free / load.ranks)) / load.feed_s,
        "trainer": 1 / (1 / load.demand + load.between_s + load.uneven_s),
    }
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

    change: Change
    text: str
    settings: dict[str, Any]
    supply: float
    together: float

    def __str__(self) -> str:
        return f"{self.text}: predicted {self.together:,.0f} img/s (the feed alone {self.supply:,.0f})"


def actions(load: Load) -> list[Action]:
    """Changes worth making, the greatest gain first; but before it changes of settings that bring a quarter as much,
    since they cost nothing."""
    found = [_action(load, *change) for change in _changes(load)]
    worth = [action for action in found if action.together >= WORTH * load.together]
    enough = 0.75 * load.together + 0.25 * max((action.together for action in worth), default=0.0)
    return sorted(worth, key=lambda a: (not (a.settings and a.together >= enough), -a.together))


def _action(before: Load, change: Change, text: str, settings: dict[str, Any], after: Load) -> Action:
    return Action(change, text, settings, predicted_supply(before, after), predicted_together(before, after))


def _changes(load: Load) -> list[tuple[Change, str, dict[str, Any], Load]]:
    """Everything that could be changed: what it is, how it is said, the feed's settings for it, the load after."""
    found: list[tuple[Change, str, dict[str, Any], Load]] = []
    if load.threads < load.cores:
        threads = ceil(load.cores / load.ranks) + 1  # of a rank; one more keeps the cores busy at the end of a batch
        after = replace(load, threads=threads * load.ranks)
        found.append(("threads", f"--threads {threads}", {"threads": threads}, after))
    if load.uneven_s * load.together > UNEVEN and load.queue_depth < DEEPER:
        after = replace(load, uneven_s=load.uneven_s * load.queue_depth / DEEPER, queue_depth=DEEPER)
        found.append(("queue", f"a queue of {DEEPER} batches", {"queue_depth": DEEPER}, after))
    if load.between_s:
        found.append(("callback", "take what runs between steps out of the loop", {}, replace(load, between_s=0.0)))
    if load.area > 1:
        after = replace(load, decode_s=load.decode_s * (1 + CROP_COST) / (load.area + CROP_COST))
        found.append(("square", "shard with --stored square", {}, after))
    if load.cold and load.fits:
        after = replace(load, storage_s=load.warm_s)
        found.append(("memory", "read the set into memory first, it fits", {}, after))
    elif load.storage_s:
        text = f"a faster disk{', or memory for the set' * load.cold}"
        found.append(("disk", text, {}, replace(load, storage_s=0.0)))
    if load.neighbours >= 0.1:
        found.append(("neighbours", "stop what else runs on these cores", {}, replace(load, neighbours=0.0)))
    lacking = max(1, ceil(load.demand * (load.feed_s + load.trainer_s) - load.free))
    more = replace(load, cores=load.cores + lacking, threads=load.threads + lacking)
    threads = ceil(more.threads / load.ranks)
    found.append(("cores", f"{lacking} more core{'s' * (lacking > 1)}, --threads {threads}", {}, more))
    return found
