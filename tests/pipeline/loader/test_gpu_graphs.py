"""The GPU's graphs without a GPU: DALI serializes a graph without building it, and checks it against its schemas.

A misspelt argument, a value of the wrong type, or data on the wrong device is then found here and not on the GPU.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
from nvidia.dali import fn

from pipeline.loader import graphs
from pipeline.loader.graphs import Graph, GraphSettings, train_graph, view_graph

GPU = GraphSettings(
    batch=8, device="cuda", device_id=None, threads=2, queue_depth=2, hw_decoder_load=0.65, largest=(512, 384)
)
MADE = {
    "read": partial(train_graph, GPU, "read"),
    "decode": partial(train_graph, GPU, "decode"),
    "full": partial(train_graph, GPU, "full"),
    "1 view": partial(view_graph, GPU, 1),
    "10 views": partial(view_graph, GPU, 10),
}


def operators(graph: Graph) -> list[tuple[str, str]]:
    """Every operator of a graph that fits the schemas: its name, and its specification as DALI prints it."""
    graph.pipeline.serialize()
    specs = [str(operator.spec) for operator in graph.pipeline._ops]
    return [(re.findall(r"OpSpec for (\w+):", spec)[0], spec) for spec in specs]


@pytest.mark.parametrize("name", MADE)
def test_a_graph_of_the_gpu_fits_the_schemas(name: str):
    """The inputs that the loader will give it are exactly its sources."""
    graph = MADE[name]()
    sources = [spec for operator, spec in operators(graph) if operator == "ExternalSource"]
    assert sorted(re.findall(r"Outputs:\s+(\w+)_cpu", "".join(sources))) == sorted(graph.inputs)


@pytest.mark.parametrize("name", ["decode", "full", "1 view", "10 views"])
def test_it_decodes_and_crops_on_the_gpu_and_does_nothing_else(name: str):
    found = {operator: spec for operator, spec in operators(MADE[name]()) if operator != "ExternalSource"}
    assert set(found) == {"decoders__Image", "Slice"}
    for argument, value in {
        "device": "mixed",
        "jpeg_fancy_upsampling": "True",
        "hw_decoder_load": "0.65",
        "preallocate_width_hint": "512",
        "preallocate_height_hint": "384",
    }.items():
        assert re.search(rf"\b{argument}: {value}", found["decoders__Image"]), found["decoders__Image"]
    assert re.search(r"\bdevice: gpu", found["Slice"])


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"hw_decoder_lod": 1.0}, "hw_decoder_lod"), ({"hw_decoder_load": "x"}, "x"), ({"device": "gpu"}, "device")],
)
def test_a_mistake_in_the_arguments_of_the_gpu_is_found(wrong: dict[str, Any], expected: str, monkeypatch: Any):
    decode = fn.decoders.image

    def mistaken(jpeg: Any, **arguments: Any) -> Any:
        return decode(jpeg, **{**arguments, **wrong})

    monkeypatch.setattr(graphs.fn.decoders, "image", mistaken)
    with pytest.raises((KeyError, ValueError, RuntimeError), match=expected):
        train_graph(GPU).pipeline.serialize()


def test_an_argument_on_the_wrong_device_is_found(monkeypatch: Any):
    """The origin of a crop must be in host memory."""
    cut = fn.slice
    monkeypatch.setattr(graphs.fn, "slice", lambda image, start, **rest: cut(image, start=start.gpu(), **rest))
    with pytest.raises(ValueError, match="must be on CPU"):
        train_graph(GPU).pipeline.serialize()


def test_labels_and_ids_stay_on_the_host():
    """The loader compares them with its plan, without a wait for the GPU."""
    graph = train_graph(GPU)
    operators(graph)
    crops, tags = graph.pipeline._graph_outputs
    assert (crops.device, tags.device) == ("gpu", "cpu")
