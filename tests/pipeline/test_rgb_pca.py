"""Eigenbasis: moments are exact, a known covariance is recovered, and any grouping of the work gives the same bits."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import rgb_pca
from pipeline.rgb_pca import check, eigenbasis_of, load, load_for, map_samples, measure, moments_of, save
from pipeline.shards.reader import ShardSet
from pipeline.workers import IN_PROCESS, Workers, ignore, workers_of


def random_images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Random images with sides of 256 to 299 pixels whose channels share most of their variance."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = rng.integers(256, 300, 2)
        grey, own = rng.normal(0, 60, (height, width, 1)), rng.normal(0, 15, (height, width, 3))
        made.append((120 + grey + own * [1.0, 0.7, 1.2]).clip(0, 255).astype(np.uint8))
    return made


def test_moments_equal_numpys_on_all_pixels():
    """Mean and covariance equal those that NumPy computes from all pixels stacked."""
    made = random_images(5)
    basis = eigenbasis_of(moments_of(made), "")
    pixels = np.concatenate([p.reshape(-1, 3) for p in made]).astype(np.float64)
    np.testing.assert_allclose(basis.mean, pixels.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(basis.covariance, np.cov(pixels.T, bias=True), rtol=1e-11)
    centres = [p[(p.shape[0] - 256) // 2 :, (p.shape[1] - 256) // 2 :][:256, :256] for p in made]
    np.testing.assert_array_equal(basis.mean_image, np.mean(centres, axis=0).transpose(2, 0, 1).astype(np.float32))


def test_any_grouping_gives_the_same_bits():
    made = random_images(6)
    whole = moments_of(made)
    for cut in range(1, 6):
        parts = moments_of(made[:cut]) + moments_of(made[cut:])
        for name in ("sums", "products", "image_sums", "pixels", "images"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize(("images", "height", "width"), [(1, 256, 17_000), (1, 300, 257), (600, 256, 256)])
def test_sums_of_white_images_are_exact(images: int, height: int, width: int):
    """The largest sums that exist: more pixels in an image, and more images, than their narrow integers can hold."""
    white, values = np.full((height, width, 3), 255, np.uint8), images * height * width
    assert height * width * 3 > rgb_pca.LANES * rgb_pca.MAX_PRODUCTS_IN_UINT32 or width < 17_000
    assert images > 2 * rgb_pca.MAX_IMAGES_IN_UINT16 or images == 1
    moments = moments_of(white for _ in range(images))
    assert (moments.sums == 255 * values).all() and (moments.products == 255**2 * values).all()
    assert (moments.image_sums == 255 * images).all()


@pytest.mark.parametrize("workers", [1, 8])
def test_a_small_set_has_jobs_for_all_workers(workers: int, train_shards: ShardSet):
    """Together the jobs have every sample once."""
    parts = list(map_samples(lambda folder, manifest_sha256, ids: ids, train_shards, Workers(None, workers)))
    assert len(parts) >= 2 * workers
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(len(train_shards)))


def test_a_known_covariance_is_recovered():
    """Pixels drawn along known axes with known deviations give these axes, as columns, and these deviations."""
    axes = np.linalg.qr(np.array([[1.0, 1, 0.2], [1, -0.2, 1], [1, -1, -1]]))[0]
    deviations = np.array([40.0, 12.0, 4.0])
    rng = np.random.default_rng(1)
    made = [
        (128 + (rng.normal(size=(256, 256, 3)) * deviations) @ axes.T).round().clip(0, 255).astype(np.uint8)
        for _ in range(8)
    ]
    basis = eigenbasis_of(moments_of(made), "")
    np.testing.assert_allclose(basis.stdevs, deviations, rtol=0.02)
    np.testing.assert_allclose(np.abs(np.sum(basis.eigenvectors * axes, axis=0)), 1, atol=1e-3)


def test_the_set_decoded_here_and_by_two_workers_is_the_same(train_shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rgb_pca, "IMAGES_PER_JOB", 13)
    one = measure(train_shards, IN_PROCESS, ignore)
    with workers_of(2, rgb_pca.__name__) as workers:
        two = measure(train_shards, workers, ignore)
    pixels = [np.asarray(Image.open(io.BytesIO(j.data))) for j in train_shards.jpegs(np.arange(len(train_shards)))]
    plain = eigenbasis_of(moments_of(pixels), train_shards.manifest_sha256)
    for other in (two, plain):
        np.testing.assert_array_equal(other.covariance, one.covariance)
        np.testing.assert_array_equal(other.mean_image, one.mean_image)
    assert one.pixels == sum(p.shape[0] * p.shape[1] for p in pixels)


def test_signs_follow_the_rule(train_shards: ShardSet):
    vectors = measure(train_shards, IN_PROCESS, ignore).eigenvectors
    assert (vectors[:, 0] > 0).all()
    assert (vectors[2, 1:] > 0).all()


def test_saved_is_loaded(train_shards: ShardSet, tmp_path: Path):
    basis = measure(train_shards, IN_PROCESS, ignore)
    save(basis, tmp_path / "basis.json")
    found = load(tmp_path / "basis.json", train_shards)
    for name in ("pixels", "mean", "covariance", "eigenvalues", "stdevs", "eigenvectors", "mean_image"):
        np.testing.assert_array_equal(getattr(found, name), getattr(basis, name))


def test_the_default_place_is_the_shard_sets_own_folder(shard_root: Path, train_shards: ShardSet, tmp_path: Path):
    """load_for reads the folder of the shard set unless it gets another path."""
    own = load_for(train_shards)
    np.testing.assert_array_equal(own.mean, load(rgb_pca.eigenbasis_path(shard_root / "train"), train_shards).mean)
    save(replace(own, mean=own.mean + 1), tmp_path / "basis.json")
    np.testing.assert_array_equal(load_for(train_shards, tmp_path / "basis.json").mean, own.mean + 1)


def test_a_basis_of_another_set_is_refused(shard_root: Path, train_shards: ShardSet, tmp_path: Path):
    basis = measure(train_shards, IN_PROCESS, ignore)
    save(replace(basis, manifest_sha256="0" * 64), tmp_path / "basis.json")
    with pytest.raises(ValueError, match=r"made of another shard set .* run: python tools/compute_pca.py"):
        load(tmp_path / "basis.json", train_shards)


def test_a_missing_or_damaged_basis_is_named(shard_root: Path, train_shards: ShardSet, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no eigenbasis here; run: python tools/compute_pca.py"):
        load(tmp_path / "none.json", train_shards)
    shutil.copy(rgb_pca.eigenbasis_path(shard_root / "train"), tmp_path / "alone.json")
    with pytest.raises(ValueError, match=r"not an eigenbasis with its mean_image.npy"):
        load(tmp_path / "alone.json", train_shards)


def test_photograph_like_pixels_pass_without_warning_and_others_do_not():
    good = eigenbasis_of(moments_of(random_images(3)), "")
    assert check(good) == []
    inverted = [np.dstack([p[..., 0], 255 - p[..., 1], p[..., 2]]) for p in random_images(3)]
    assert "positively correlated" in check(eigenbasis_of(moments_of(inverted), ""))[0]
    dark = [(p // 16) for p in random_images(3)]
    assert any("standard deviations" in line for line in check(eigenbasis_of(moments_of(dark), "")))


def test_decoding_and_sums_equal_pillow_and_float64_bit_for_bit(train_shards: ShardSet):
    sums, products = np.zeros(3, np.int64), np.zeros((3, 3), np.int64)
    jpegs = train_shards.jpegs(np.arange(len(train_shards)))
    images = [rgb_pca._decode(jpeg) for jpeg in jpegs]
    for jpeg, image in zip(jpegs, images, strict=True):
        with Image.open(BytesIO(jpeg.data)) as opened:
            assert np.array_equal(image, np.asarray(opened))
        flat = image.reshape(-1, 3).astype(np.float64)
        sums += flat.sum(axis=0).astype(np.int64)
        products += (flat.T @ flat).astype(np.int64)
    moments = moments_of(images)
    assert np.array_equal(moments.sums, sums) and np.array_equal(moments.products, products)
