"""tools/figures.py draws each figure from what the other tools have made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader.augment import CROP
from pipeline.rgb_pca import load_for
from pipeline.shards.reader import open_shards
from pipeline.shards.settings import ResizeSettings
from tests.support.tool_runs import printed, tool
from tools.shared.figures.augmentations import augmented
from tools.shared.figures.curves import SMOOTHED_POINTS, series
from tools.shared.figures.kernels import kernel_sheet
from tools.shared.figures.predictions import nearest
from tools.shared.figures.relu_tanh import curves_of
from tools.shared.image_files import stored_pixels

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 32 x 32 images of two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("cifar")
    numbers = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        for split, count in (("train", 160), ("val", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = numbers.integers(0, 60, (32, 32, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def last_checkpoint(root: Path) -> Path:
    return max((root / "a" / "checkpoints").glob("step-*"))


def drawn(path: Path) -> bytes:
    """Asserts that the file is an image that is not of one colour, and returns its bytes."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 4
    else:
        assert "<svg" in path.read_text()
    return path.read_bytes()


def test_relu_against_tanh(cifar: Path, tmp_path: Path):
    """The screen, --json and the figure agree; --from-json draws the same again without training."""
    record, first, again = tmp_path / "r.json", tmp_path / "first.svg", tmp_path / "again.svg"
    options = ["--rates", "0.0005,0.002", "--trial-epochs", 1, "--epochs", 30, "--json", record]
    out = printed(tool("figures", "relu-tanh", cifar, "--out", first, *options))
    found = json.loads(record.read_text())
    curves = curves_of(found)
    assert set(curves) == {"relu", "tanh"} and found["images"] == 320
    for each in curves.values():
        *trials, final = each
        best = min(trials, key=lambda one: one.errors[-1])
        assert len(trials) == 2 and final.settings.learning_rate == best.settings.learning_rate
    relu, tanh = (curves[name][-1].epochs_to_target for name in ("relu", "tanh"))
    assert found["ratio_of_epochs"] == tanh / relu and f"tanh to ReLU: {tanh / relu:.2f}" in out
    printed(tool("figures", "relu-tanh", "--from-json", record, "--out", again))
    assert drawn(first) == drawn(again)


def test_kernels(end_to_end: Path, tmp_path: Path):
    printed(tool("figures", "kernels", last_checkpoint(end_to_end), "--out", tmp_path / "k.png"))
    drawn(tmp_path / "k.png")


def test_each_kernel_has_its_place_and_its_own_scale():
    """Grey is 0; the largest absolute weight of a kernel is black or white."""
    kernels = np.zeros((48, 3, 11, 11), np.float32)
    kernels[17, 0, 0, 0], kernels[17, 1, 0, 0] = 0.5, -0.25
    sheet = kernel_sheet(kernels)
    assert sheet.shape == (35, 191, 3)
    assert sheet[12, 12].tolist() == [255, 64, 128]  # row 1, column 1 of three rows of 16
    assert sheet[0, 0].tolist() == [128, 128, 128]


def test_top5_and_neighbours(end_to_end: Path, tmp_path: Path):
    shards, checkpoint = end_to_end / "shards", last_checkpoint(end_to_end)
    printed(tool("figures", "top5", checkpoint, shards / "val", "--images", 3, "--out", tmp_path / "t.png"))
    command = ["neighbours", checkpoint, shards / "train", "--queries", shards / "val", "--images", 2]
    printed(tool("figures", *command, "--out", tmp_path / "n.png"))
    drawn(tmp_path / "t.png")
    drawn(tmp_path / "n.png")


def test_the_nearest_neighbour_of_a_sample_is_itself():
    features = torch.randn(10, 5)
    assert nearest(features[[4, 7]], features, 3)[:, 0].tolist() == [4, 7]


def test_augmentations(end_to_end: Path, tmp_path: Path):
    photograph, out = tmp_path / "p.png", tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(photograph)
    printed(tool("figures", "augmentations", photograph, end_to_end / "shards" / "train", "--out", out))
    drawn(out)


def test_lighting_moves_all_pixels_alike(end_to_end: Path, tmp_path: Path):
    """Images of a row of lighting noise differ by one colour, before rounding and clipping."""
    photograph = tmp_path / "p.png"
    Image.new("RGB", (300, 300), (120, 130, 140)).save(photograph)
    shards = open_shards(end_to_end / "shards" / "train")
    pixels = stored_pixels(photograph, ResizeSettings())
    for convention in ("source2012", "paper"):
        images = augmented(pixels, load_for(shards), convention, 4)
        assert all(image.shape == (CROP, CROP, 3) and np.ptp(image, axis=(0, 1)).max() <= 2 for image in images)
        assert len({image[0, 0].tobytes() for image in images}) > 1


def test_curves(end_to_end: Path, tmp_path: Path):
    printed(tool("figures", "curves", end_to_end / "a", "--out", tmp_path / "c.svg"))
    drawn(tmp_path / "c.svg")


def test_a_long_curve_shows_means_of_neighbours():
    lines = [{"step": step, "loss": float(step)} for step in range(1000)]
    steps, losses = series(lines, "loss")
    assert len(steps) == SMOOTHED_POINTS and np.array_equal(steps, losses) and steps[0] == 2.0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["kernels", "no/step-000000001", "--out", "k.png"], "no/step-000000001"),
        (["kernels", "a", "--out", "k.pdf"], "expected a name that ends in .png or .svg"),
        (["curves", ".", "--out", "c.svg"], "expected the folder of a run"),
        (["relu-tanh", "--out", "r.svg"], "name either SOURCE"),
        (["augmentations", "pyproject.toml", "SHARDS", "--out", "a.png"], "pyproject.toml: not an image"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], found: str, end_to_end: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("no image")
    given = [str(end_to_end / "shards" / "train") if each == "SHARDS" else each for each in arguments]
    done = tool("figures", *given)
    assert done.returncode == 2 and found in done.stderr.splitlines()[-1]
    assert list(Path().iterdir()) == [Path("pyproject.toml")]
