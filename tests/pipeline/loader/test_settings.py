"""Wrong settings and wrong use are rejected before anything runs, with a message that names the mistake."""

import pytest
import torch

from pipeline.loader.loader import TrainLoader, view_loader
from pipeline.loader.settings import LoaderSettings
from tests.support.loader_fixtures import settings


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"seed": -1},
        {"device": "tpu"},
        {"threads": 0},
        {"queue_depth": 0},
        {"mean": "median"},
        {"order": "stored"},
        {"window_shards": 0},
        {"on_bad_sample": "guess"},
        {"max_bad_samples": 0},
        {"positions": 34},
        {"hw_decoder_load": 1.5},
    ],
    ids=str,
)
def test_settings_are_checked(changes):
    """Every impossible value is rejected with the name of its setting."""
    with pytest.raises(ValueError, match=next(iter(changes)).replace("positions", "crop positions")):
        LoaderSettings(**changes)


def test_wrong_use_is_rejected(shards, basis):
    """A batch, a step or a number of views that does not fit is named before anything runs."""
    with pytest.raises(ValueError, match="27 samples do not fill one batch of 28"):
        TrainLoader(shards, basis, settings(batch=28))
    with pytest.raises(ValueError, match="batch of 9 cannot be shared evenly by 2 ranks"):
        TrainLoader(shards, basis, settings(batch=9), ranks=2)
    with pytest.raises(ValueError, match="start_step is 4, but an epoch has 3"):
        TrainLoader(shards, basis, settings(), start_step=4)
    with pytest.raises(ValueError, match="2 views"):
        next(view_loader(shards, basis, settings(), views=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_needs_a_device(shards, basis):
    """Without a CUDA device, device "cuda" is an error; the loader does not run on the CPU instead."""
    with pytest.raises(ValueError, match=r"torch finds no CUDA device: driver found: .*use --device cpu"):
        TrainLoader(shards, basis, settings(device="cuda"))
