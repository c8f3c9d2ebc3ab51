"""Draws are pure, uniform and independent; lighting noise has its convention's deviation; the reference is right."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.loader.augment import VIEW_ORIGINS, Lighting, draw, mean_of, reference_train, reference_views

# Standard deviations (pixel values 0-255) and eigenvectors of RGB pixels, from the release of 2014. All values of the
# mean image differ.
STDEVS = np.array([121.78, 37.094, 19.721])
VECTORS = np.linalg.qr(np.array([[0.5635, -0.7126, 0.4180], [0.5762, -0.0235, -0.8170], [0.5920, 0.7012, 0.3973]]))[0]
BASIS = SimpleNamespace(
    mean=np.array([120.0, 110.0, 100.0]),
    stdevs=STDEVS,
    eigenvalues=STDEVS**2,
    eigenvectors=VECTORS,
    mean_image=np.arange(3 * 256 * 256, dtype=np.float32).reshape(3, 256, 256) / 1000,
)
NO_OFFSET = np.zeros(3, np.float32)


def pixels(height: int, width: int) -> np.ndarray:
    """Pixels (H, W, 3) that encode their place: red is the row and green the column, modulo 256; blue is the rest."""
    row, column = np.mgrid[:height, :width]
    return np.stack([row % 256, column % 256, row // 256 * 16 + column // 256], axis=-1).astype(np.uint8)


def test_draws_belong_to_the_sample():
    """A sample's draws depend on seed, epoch and id, and not on the other samples of the batch."""
    ids = np.array([5, 999_999, 0, 17])
    together = draw(1, 2, ids)
    for row, sample_id in enumerate(ids):
        alone = draw(1, 2, np.array([sample_id]))
        for name in ("left", "top", "mirror", "normals"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[row])
    for other in (draw(0, 2, ids), draw(1, 3, ids)):
        assert not np.array_equal(other.normals, together.normals)


def test_draws_are_uniform_and_independent():
    """Offsets and mirroring take every value equally often, and no two of the drawn numbers are correlated."""
    draws = draw(0, 0, np.arange(66_000))
    for offsets in (draws.left, draws.top):
        counts = np.bincount(offsets, minlength=33)
        assert len(counts) == 33
        assert ((counts - 2000) ** 2 / 2000).sum() < 62.5  # chi-square, 32 degrees: exceeded once in a thousand seeds
    assert abs(draws.mirror.mean() - 0.5) < 0.008
    columns = np.column_stack([draws.left, draws.top, draws.mirror, draws.normals, np.arange(66_000)])
    correlations = np.corrcoef(columns.T)[np.triu_indices(7, 1)]
    assert np.abs(correlations).max() < 0.016  # four standard deviations
    next_epoch = draw(0, 1, np.arange(66_000))
    assert abs(np.corrcoef(draws.left, next_epoch.left)[0, 1]) < 0.016


def test_positions_bound_the_offsets():
    """With 32 positions, the number of paper section 4.1, the last offset is 31."""
    draws = draw(0, 0, np.arange(4000), positions=32)
    assert (draws.left.min(), draws.left.max()) == (draws.top.min(), draws.top.max()) == (0, 31)


@pytest.mark.parametrize(
    ("convention", "deviations"), [("source2012", (11.07, 3.37, 1.79)), ("paper", (5.82, 0.54, 0.15))]
)
def test_lighting_noise_deviation_along_the_eigenvectors(convention, deviations):
    """A normal of 1 shifts an image along its eigenvector by the convention's deviation, in pixel values 0-255."""
    offsets, divisor = Lighting(convention).offsets_and_divisor(np.eye(3, dtype=np.float32), BASIS)
    assert np.allclose(np.diag(offsets @ VECTORS) / divisor, deviations, atol=0.006)
    assert np.allclose(offsets @ VECTORS, np.diag(np.diag(offsets @ VECTORS)), atol=1e-4)
    assert divisor == (1.1 if convention == "source2012" else 1)


@pytest.mark.parametrize("lighting", [Lighting("none"), Lighting("source2012", 0.0), Lighting("paper", 0.0)])
def test_no_lighting_noise_changes_nothing(lighting):
    """With "none" or a coefficient of 0 there is neither noise nor division."""
    offsets, divisor = lighting.offsets_and_divisor(np.ones((4, 3), np.float32), BASIS)
    assert (offsets == 0).all()
    assert divisor == 1


def test_lighting_is_checked():
    """Unknown conventions and impossible coefficients are rejected."""
    with pytest.raises(ValueError, match="'torch'; choose one of source2012, paper, none"):
        Lighting("torch")
    with pytest.raises(ValueError, match="coefficient is -1"):
        Lighting(coefficient=-1)


@pytest.mark.parametrize(("height", "width"), [(256, 400), (400, 256), (256, 257), (256, 256)])
def test_crop_lies_in_the_central_square(height, width):
    """The crop's first pixel is (top, left) of the central 256 x 256; an odd surplus pixel is left at the end."""
    zero = np.zeros((3, 1, 1), np.float32)
    crop = reference_train(pixels(height, width), 3, 32, False, NO_OFFSET, 1.0, zero)
    y, x = (height - 256) // 2 + 3, (width - 256) // 2 + 32
    assert crop.shape == (3, 224, 224)
    assert crop.dtype == np.float32
    assert (crop[0, 0, 0], crop[1, 0, 0]) == (y % 256, x % 256)
    assert (crop[0, -1, -1], crop[1, -1, -1]) == ((y + 223) % 256, (x + 223) % 256)


def test_mean_image_does_not_move_with_the_crop():
    """The centre of the mean image is subtracted from every crop, at any position, and is not mirrored with it."""
    mean = mean_of(BASIS, "image")
    assert np.array_equal(mean, BASIS.mean_image[:, 16:240, 16:240])
    zero = np.zeros((3, 1, 1), np.float32)
    for top, left, mirror in ((0, 0, False), (32, 5, True)):
        plain = reference_train(pixels(300, 256), top, left, mirror, NO_OFFSET, 1.0, zero)
        assert np.array_equal(reference_train(pixels(300, 256), top, left, mirror, NO_OFFSET, 1.0, mean), plain - mean)
    mirrored = reference_train(pixels(300, 256), 32, 5, True, NO_OFFSET, 1.0, zero)
    assert np.array_equal(mirrored[:, :, ::-1], reference_train(pixels(300, 256), 32, 5, False, NO_OFFSET, 1.0, zero))


def test_offset_is_added_before_the_division():
    """(pixels - mean + offset) / divisor, per channel."""
    offset = np.array([1, 2, 3], np.float32)
    normalised = reference_train(pixels(256, 256), 0, 0, False, offset, 1.1, mean_of(BASIS, "channel"))
    assert np.allclose(normalised[:, 0, 0], (np.array([0, 0, 0]) - BASIS.mean + offset) / 1.1, atol=1e-5)


def test_views_are_corners_centre_and_mirrors():
    """Ten views are five crops, then the same mirrored; one view is the centre; each has the same mean subtracted."""
    image = pixels(256, 300)
    zero = np.zeros((3, 1, 1), np.float32)
    views = reference_views(image, zero, 10)
    assert views.shape == (10, 3, 224, 224)
    assert np.array_equal(views[5:], views[:5, :, :, ::-1])
    for view, (top, left) in zip(views, VIEW_ORIGINS, strict=False):
        assert (view[0, 0, 0], view[1, 0, 0]) == (top, (300 - 256) // 2 + left)
    assert sorted(VIEW_ORIGINS) == [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    assert np.array_equal(reference_views(image, zero, 1), views[2:3])
    mean = mean_of(BASIS, "image")
    assert np.array_equal(reference_views(image, mean, 10), views - mean)
