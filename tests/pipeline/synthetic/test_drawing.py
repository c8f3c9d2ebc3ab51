"""Drawing: images are functions of their generator, have the statistics of photographs, and hide the class in shape."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.synthetic.drawing import class_words, draw_image
from pipeline.synthetic.settings import MAX_CLASSES

TRAIN_PER_CLASS, VAL_PER_CLASS = 40, 15


@pytest.fixture(scope="module")
def images() -> list[list[NDArray[np.uint8]]]:
    """Images by class, small ones, because the tested properties do not depend on size."""
    return [
        [
            draw_image(label, 64, 128, np.random.default_rng([5, label, n]))
            for n in range(TRAIN_PER_CLASS + VAL_PER_CLASS)
        ]
        for label in range(12)
    ]


def test_no_two_classes_show_the_same_object() -> None:
    """Every class has words of its own; the first twelve classes share no shape and no pattern."""
    words = [class_words(label).split(",")[0] for label in range(MAX_CLASSES)]
    assert len(set(words)) == MAX_CLASSES
    patterns, shapes = zip(*(name.split() for name in words[:12]), strict=True)
    assert len(set(patterns)) == len(set(shapes)) == 12


def test_images_are_functions_of_their_generator(images: list[list[NDArray[np.uint8]]]) -> None:
    """The same generator state gives the same image; sides stay in range, in both orientations."""
    np.testing.assert_array_equal(images[7][3], draw_image(7, 64, 128, np.random.default_rng([5, 7, 3])))
    shapes = [image.shape for of_class in images for image in of_class]
    assert {shape[2] for shape in shapes} == {3}
    assert all(64 <= side <= 128 for shape in shapes for side in shape[:2])
    wide = sum(width > height for height, width, _ in shapes) / len(shapes)
    assert 0.35 < wide < 0.65


def test_pixels_are_distributed_like_those_of_photographs(images: list[list[NDArray[np.uint8]]]) -> None:
    """Channels are correlated, the first eigenvector is near grey, and neighbouring pixels are similar."""
    pixels = np.concatenate([image.reshape(-1, 3) for of_class in images for image in of_class]).astype(float)
    covariance = np.cov(pixels.T)
    assert np.all(covariance > 0)
    assert np.all((np.sqrt(np.diag(covariance)) > 55) & (np.sqrt(np.diag(covariance)) < 80))
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    assert abs(eigenvectors[:, -1] @ np.full(3, 3**-0.5)) > 0.98
    assert eigenvalues[-1] > 5 * eigenvalues[-2]
    greens = [image[..., 1].astype(float) for of_class in images for image in of_class]
    assert np.mean([np.corrcoef(g[:, 1:].ravel(), g[:, :-1].ravel())[0, 1] for g in greens]) > 0.8


def accuracy_on_mean_colour(mean_colours: NDArray[np.float64]) -> float:
    """Top-1 accuracy of ridge regression on mean colours (classes, images, 3), tested on the last of each class."""
    train, val = mean_colours[:, :TRAIN_PER_CLASS].reshape(-1, 3), mean_colours[:, TRAIN_PER_CLASS:].reshape(-1, 3)
    centre, spread = train.mean(axis=0), train.std(axis=0)
    train, val = (np.column_stack([(x - centre) / spread, np.ones(len(x))]) for x in (train, val))
    targets = np.repeat(np.eye(len(mean_colours)), TRAIN_PER_CLASS, axis=0)
    weights = np.linalg.solve(train.T @ train + np.eye(4), train.T @ targets)
    labels = np.repeat(np.arange(len(mean_colours)), VAL_PER_CLASS)
    return float(np.mean(np.argmax(val @ weights, axis=1) == labels))


def test_mean_colour_does_not_reveal_the_class(images: list[list[NDArray[np.uint8]]]) -> None:
    """A linear classifier on the mean colour stays near chance. It does not if classes are tinted."""
    mean_colours = np.array([[image.mean(axis=(0, 1)) for image in of_class] for of_class in images])
    assert accuracy_on_mean_colour(mean_colours) < 0.25
    angles = np.arange(12) * 2 * np.pi / 12
    tints = 150 * np.stack([np.cos(angles), np.sin(angles), np.zeros(12)], axis=1)
    assert accuracy_on_mean_colour(mean_colours + tints[:, None, :]) > 0.5
