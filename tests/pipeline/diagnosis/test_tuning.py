"""Tuning on made-up throughputs keeps the cheapest settings that suffice, tries each value once, and is read back.

Stored shapes: both temporary sets have the same images, and squares are the centres of whole images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.diagnosis.stored_shape import StoredShapes, both_shapes, has_whole_images
from pipeline.diagnosis.tuning import (
    TUNED_SETTINGS,
    choices,
    compare_decoders,
    decoder_shares,
    load_tuned,
    speed_settings,
    tune,
)
from pipeline.loader.settings import LoaderSettings
from pipeline.shards.reader import ShardSet
from pipeline.shards.settings import ResizeSettings
from pipeline.shards.transcode import encode
from tests.support.shard_fixtures import decoded


def measure(candidates: Mapping[str, LoaderSettings]) -> dict[str, float]:
    """4 cores that give 1,000 img/s a thread, 20% less with a queue of one batch, to a trainer of 3,300 img/s."""
    return {
        name: min(3300.0, 1000.0 * min(s.threads, 4) * (0.8 if s.queue_depth == 1 else 1.0))
        for name, s in candidates.items()
    }


def test_the_cheapest_settings_that_suffice_are_kept():
    """4 threads are the first to reach the trainer's 3,300 img/s, and a queue of 2 the first that loses none of it."""
    best, trials = tune(LoaderSettings(threads=8), {"threads": (1, 2, 4, 8), "queue_depth": (1, 2, 3)}, measure)
    assert (best.threads, best.queue_depth) == (4, 2)
    assert len(trials) == 7
    assert max(trial.img_s for trial in trials) == 3300


def test_settings_that_change_images_are_not_searched():
    start = LoaderSettings(batch=32, seed=5, threads=3, mean="channel")
    best, _ = tune(start, choices(start, 4), measure)
    assert {**vars(best), **speed_settings(start)} == vars(start)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_share_of_the_jpeg_engines_is_measured_but_not_chosen(device):
    """It changes pixels. On the CPU it has no effect, and is not measured."""
    start = LoaderSettings(device=device, threads=3)
    best, _ = tune(start, choices(start, 4), lambda candidates: dict.fromkeys(candidates, 1.0))
    assert best.hw_decoder_load == 0 and "hw_decoder_load" not in speed_settings(best)
    trials = compare_decoders(best, lambda found: {name: 1000 * s.hw_decoder_load for name, s in found.items()})
    assert [trial.settings["hw_decoder_load"] for trial in trials] == list(decoder_shares(start))
    assert len(trials) == (0 if device == "cpu" else 6) and all(
        trial.img_s == 1000 * trial.settings["hw_decoder_load"] for trial in trials
    )


def test_a_file_that_tuned_the_share_of_the_engines_is_refused(tmp_path: Path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"settings": {"threads": 2, "queue_depth": 2, "hw_decoder_load": 0.65}}))
    with pytest.raises(ValueError, match=r"hw_decoder_load 0.65, which changes pixels.*--hw-decoder-load 0.65"):
        load_tuned(path)
    path.write_text(json.dumps({"settings": {"threads": 2, "queue_depth": 2, "hw_decoder_load": 0.0}}))
    assert load_tuned(path) == {"threads": 2, "queue_depth": 2}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choices_are_valid_settings_cheapest_first(device):
    options = choices(LoaderSettings(device=device), 4)
    assert set(options) == set(TUNED_SETTINGS)
    for kind, values in options.items():
        assert list(values) == sorted(set(values))
        for value in values:
            LoaderSettings(**{kind: value})
    assert options["threads"][-1] >= 5


def test_a_file_is_read_back(tmp_path: Path):
    path = tmp_path / "tuned.json"
    shapes = StoredShapes(7, 2.0, 1.0, (1.9, 2.1))
    path.write_text(json.dumps({"settings": speed_settings(LoaderSettings(threads=3)), "stored_shape": asdict(shapes)}))
    assert load_tuned(path) == speed_settings(LoaderSettings(threads=3))
    stored = json.loads(path.read_text())["stored_shape"]
    assert StoredShapes(**{**stored, "speedups": tuple(stored["speedups"])}) == shapes


@pytest.mark.parametrize(
    ("short_side", "speedups", "needed"),
    [(1000, (1.3, 1.2), True), (1200, (1.3, 1.2), False), (1000, (1.3, 1.01), False), (400, (1.1, 1.1), True)],
)
def test_squares_are_needed_if_they_gain_in_every_round_and_whole_images_are_too_slow(
    short_side: float, speedups: tuple[float, ...], needed: bool
):
    """A demand of 1,000 img/s requires 1,100, with the headroom."""
    assert StoredShapes(9, 1.1 * short_side, short_side, speedups).needed(1000) == needed


def test_both_shapes_have_the_same_images_and_squares_are_their_centres(train_shards: ShardSet):
    """A square is the central 256 x 256 of the stored image, encoded with the set's settings; labels stay with keys."""
    ids = {train_shards.key(sample_id): sample_id for sample_id in range(len(train_shards))}
    with both_shapes(train_shards, 30) as sets:
        square, whole = sets["square"], sets["short-side"]
        assert len(square) == len({square.key(i) for i in range(30)}) == 30
        assert has_whole_images(whole) and not has_whole_images(square)
        for number in range(30):
            original = ids[square.key(number)]
            image = decoded(train_shards, original)
            top, left = (image.shape[0] - 256) // 2, (image.shape[1] - 256) // 2
            middle = np.ascontiguousarray(image[top : top + 256, left : left + 256])
            (jpeg,) = square.jpegs(np.array([number]))
            assert jpeg.tobytes() == encode(middle, ResizeSettings()).jpeg
            assert decoded(square, number).shape == (256, 256, 3)
            assert (whole.key(number), decoded(whole, number).shape) == (square.key(number), image.shape)
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
def test_a_file_of_another_kind_is_an_error(text: str, tmp_path: Path):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="run that first"):
        load_tuned(path)
