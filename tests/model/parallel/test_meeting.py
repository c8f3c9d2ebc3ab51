"""Ranks that meet: no time limit while a rank works, one message for one mistake, no wait for a rank that is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from model.parallel.meeting import Meeting, OtherRankEnded, meet
from model.parallel.ranks import cores_of_rank, ranks_here
from tools.shared.rank_agreement import first_rank_first, require_same


class CountingStore(HashStore):
    """Counts the looks into the store, and sets an event after three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.waited = 0, threading.Event()

    def check(self, keys: list[str]) -> bool:
        """As the store's; counted."""
        self.looks += 1
        if self.looks > 3:
            self.waited.set()
        return bool(super().check(keys))


def on_two(action: Callable[[Meeting], object], store: HashStore | None = None) -> list[object]:
    """What `action` returns or raises on two ranks, each in a thread."""
    store = store or HashStore()
    results: list[object] = [None, None]

    def work(rank: int) -> None:
        try:
            results[rank] = action(Meeting(rank, 2, store))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_texts_reach_all_ranks_in_each_exchange():
    both = on_two(lambda m: [m.exchange(f"{m.rank}"), m.exchange(f"again {m.rank}")])
    assert both == [[["0", "1"], ["again 0", "again 1"]]] * 2
    assert Meeting().exchange("alone") == ["alone"]


def test_a_rank_waits_as_long_as_another_works():
    """Hashing a large set: the other rank looks into the store again and again, and no operation times out."""
    store = CountingStore()

    def hash_a_set(meeting: Meeting) -> str:
        if meeting.first:
            assert store.waited.wait(60)
        return f"opened on {meeting.rank}"

    results = on_two(lambda m: first_rank_first(m, lambda: hash_a_set(m)), store)
    assert results == ["opened on 0", "opened on 1"] and store.looks > 3


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_on_one_rank_ends_all_and_gives_one_message(failing: int):
    def open_set(meeting: Meeting) -> None:
        if meeting.rank == failing:
            raise ValueError("no such folder")

    results = on_two(lambda m: first_rank_first(m, lambda: open_set(m)))
    error, silent = results[failing], results[1 - failing]
    assert isinstance(error, ValueError) and str(error) == "no such folder"
    assert isinstance(silent, SystemExit) and silent.code == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_no_rank_waits_for_one_that_ended_otherwise(failing: int):
    def open_set(meeting: Meeting) -> None:
        if meeting.rank == failing:
            raise KeyboardInterrupt

    results = on_two(lambda m: first_rank_first(m, lambda: open_set(m)))
    assert isinstance(results[failing], KeyboardInterrupt)
    assert isinstance(results[1 - failing], OtherRankEnded)


def test_the_first_value_that_differs_is_named_with_both_hosts():
    values = [{"--seed": 1, "--layout": "towers"}, {"--seed": 1, "--layout": "data"}]
    error, silent = on_two(lambda m: require_same(m, "options", values[m.rank]))
    assert isinstance(error, ValueError)
    assert str(error).startswith("--layout: towers on rank 0 (") and "but data on rank 1 (" in str(error)
    assert isinstance(silent, SystemExit) and silent.code == 2


@pytest.mark.parametrize(
    ("rank", "world", "line"),
    [
        ("5", "2", "RANK=5, WORLD_SIZE=2: expected a RANK from 0"),
        ("0", "two", "WORLD_SIZE=two: expected a whole number"),
    ],
)
def test_an_impossible_place_is_named_at_once(rank: str, world: str, line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=line):
        meet(60)


def test_a_rank_that_stays_alone_says_so(monkeypatch: pytest.MonkeyPatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(
        ValueError, match=r"^rank 0 of 2 did not meet the others at localhost:0 within 0\.1 s; start all"
    ):
        meet(0.1)


def test_a_machine_has_at_least_one_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert ranks_here() == 1 and cores_of_rank(3) == 3
