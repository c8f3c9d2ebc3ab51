"""The search for settings, on rates made up: it keeps the least that does, tries everything once, and is read back.
The stored shapes that are measured beside it: the same pictures, squares as they are defined."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.diagnosis.stored_shape import StoredShapes, both_shapes, has_whole_images
from pipeline.diagnosis.tuning import KINDS, choices, load_tuned, speed_of, tune
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import ShardSet
from pipeline.shards.transcode import ResizeSettings, encode
from tests.support.shard_fixtures import decoded


def measure(rivals: Mapping[str, LoaderSettings]) -> dict[str, float]:
    """A machine of 4 cores that gives 1,000 img/s a thread, 20 % less with one batch ahead; the trainer takes 3,300."""
    return {
        name: min(3300.0, 1000.0 * min(s.threads, 4) * (0.8 if s.queue_depth == 1 else 1.0))
        for name, s in rivals.items()
    }


def test_the_least_that_does_is_kept():
    """4 threads are the first to reach the trainer's rate, 2 batches ahead the first not to lose any."""
    best, trials = tune(LoaderSettings(threads=8), {"threads": (1, 2, 4, 8), "queue_depth": (1, 2, 3)}, measure)
    assert (best.threads, best.queue_depth) == (4, 2)
    assert len(trials) == 7
    assert max(trial.img_s for trial in trials) == 3300


def test_nothing_that_changes_pictures_is_touched():
    start = LoaderSettings(batch=32, seed=5, threads=3, mean="channel")
    best, _ = tune(start, choices(start, 4), measure)
    assert {**vars(best), **speed_of(start)} == vars(start)


@pytest.mark.parametrize(("device", "kinds"), [("cpu", 2), ("cuda", 3)])
def test_choices_are_valid_settings_cheapest_first(device, kinds):
    options = choices(LoaderSettings(device=device), 4)
    assert len(options) == kinds and set(options) <= set(KINDS)
    for kind, values in options.items():
        assert list(values) == sorted(set(values))
        for value in values:
            LoaderSettings(**{kind: value})
    assert options["threads"][-1] >= 5


def test_a_file_is_read_back(tmp_path: Path):
    path = tmp_path / "tuned.json"
    shapes = StoredShapes(7, 2.0, 1.0, (1.9, 2.1))
    path.write_text(json.dumps({"settings": speed_of(LoaderSettings(threads=3)), "stored_shape": asdict(shapes)}))
    assert load_tuned(path) == speed_of(LoaderSettings(threads=3))
    stored = json.loads(path.read_text())["stored_shape"]
    assert StoredShapes(**{**stored, "times": tuple(stored["times"])}) == shapes


@pytest.mark.parametrize(
    ("short_side", "times", "needed"),
    [(1000, (1.3, 1.2), True), (1200, (1.3, 1.2), False), (1000, (1.3, 1.01), False), (400, (1.1, 1.1), True)],
)
def test_squares_are_needed_where_they_always_gain_and_the_rest_does_not_do(
    short_side: float, times: tuple[float, ...], needed: bool
):
    """A demand of 1,000 img/s wants 1,100."""
    assert StoredShapes(9, 1.1 * short_side, short_side, times).needed(1000) == needed


def test_either_shape_holds_the_same_pictures_and_squares_are_their_centres(train_shards: ShardSet):
    """A square is the 256 x 256 in the middle of what is stored, encoded as the set is; labels stay with their keys."""
    ids = {train_shards.key(sample_id): sample_id for sample_id in range(len(train_shards))}
    with both_shapes(train_shards, 30) as sets:
        square, whole = sets["square"], sets["short-side"]
        assert len(square) == len({square.key(i) for i in range(30)}) == 30
        assert has_whole_images(whole) and not has_whole_images(square)
        for number in range(30):
            original = ids[square.key(number)]
            picture = decoded(train_shards, original)
            top, left = (picture.shape[0] - 256) // 2, (picture.shape[1] - 256) // 2
            middle = np.ascontiguousarray(picture[top : top + 256, left : left + 256])
            (jpeg,) = square.jpegs(np.array([number]))
            assert jpeg.tobytes() == encode(middle, ResizeSettings()).jpeg
            assert decoded(square, number).shape == (256, 256, 3)
            assert (whole.key(number), decoded(whole, number).shape) == (square.key(number), picture.shape)
            labels = [shards.index["label"][i] for shards, i in ((square, number), (whole, number))]
            assert labels == 2 * [train_shards.index["label"][original]]


def test_an_error_leaves_no_temporary_set(train_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        with both_shapes(train_shards, 5) as sets:
            assert sets["square"].folder.is_relative_to(tmp_path)
            raise RuntimeError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"threads": 1}}'])
def test_another_file_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="run that first"):
        load_tuned(path)
