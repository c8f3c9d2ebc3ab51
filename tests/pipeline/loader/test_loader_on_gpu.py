"""The GPU backend against the CPU backend and the reference."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader.loader import view_loader
from pipeline.shards.format import Sample
from tests.support.loader_fixtures import MAX_PIXEL_DIFFERENCE, expected_images, settings, take
from tests.support.shard_fixtures import jpeg_of, write_set

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mean", ["image", "channel"])
def test_gpu_equals_cpu(shards, basis, mean):
    """Both backends give the same samples, and images that differ by less than 1 pixel value (0-255) on average."""
    on_cpu = take(shards, basis, 4, settings(mean=mean))
    on_gpu = take(shards, basis, 4, settings(mean=mean, device="cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.is_cuda and gpu.labels.is_cuda and gpu.ids.is_cuda
        assert gpu.ids.tolist() == cpu.ids.tolist() and gpu.labels.tolist() == cpu.labels.tolist()
        assert (gpu.images.cpu() - cpu.images).abs().mean() * 1.1 < 1
    views_cpu, views_gpu = (
        next(view_loader(shards, basis, settings(mean=mean, device=d), 10)) for d in ("cpu", "cuda")
    )
    assert (views_gpu.images.cpu() - views_cpu.images).abs().mean() < 1


def test_gpu_crop_mirror_and_noise_are_exact(tmp_path, basis):
    """The GPU equals the reference on a ramp of flat grey stripes, which every decoder decodes alike."""
    ramp = np.broadcast_to((np.arange(320) // 16 * 12).astype(np.uint8)[None, :, None], (256, 320, 3))
    samples = [Sample(f"ramp_{n}", 0, jpeg_of(Image.fromarray(ramp)), 320, 256) for n in range(16)]
    shards = write_set(tmp_path, samples)
    how = settings(device="cuda")
    (batch,) = take(shards, basis, 1, how)
    difference = np.abs(batch.images.cpu().numpy() - expected_images(shards, basis, how, batch))
    # The median, since decoders may differ at the edges of the stripes.
    assert np.median(difference) < MAX_PIXEL_DIFFERENCE
