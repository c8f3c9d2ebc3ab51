"""`measure_throughput` counts the images of a window only, and its baselines take turns."""

import numpy as np

from pipeline.profiling.throughput import measure_throughput


def test_throughput_counts_the_images_of_the_window():
    """Each iterator is fresh in each window and closed after it, windows are interleaved, discarded batches ignored."""
    closed = []

    def sizes(name):
        def endless():
            try:
                for number in range(10**6):
                    yield 10**9 if number < 2 else 8  # counting one of the first two would show in the result
            finally:
                closed.append(name)

        return endless

    windows = []
    measured = measure_throughput({"a": sizes("a"), "b": sizes("b")}, 0.02, 3, windows.append, discard=2)
    assert closed == ["a", "b"] * 3 and windows == [1] * 6
    for found in measured.values():
        assert 0 < found.img_s_min <= found.img_s <= found.img_s_max < 10**9
        assert np.isclose(found.cores_used, found.cpu_ms_per_img * found.img_s / 1000, rtol=0.5, atol=0.5)
