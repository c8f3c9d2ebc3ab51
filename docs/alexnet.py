# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # AlexNet, from pixels to kernels
#
# A tour in four parts, on the sample dataset. Run `make train` first: it draws the sample and makes its shards.
#
# 1. What PCA lighting noise does to an image, and where its directions come from
# 2. The two towers, and what crosses between them
# 3. A trainer that waits for its input, and the report that says why
# 4. What the first layer learns
#
# This notebook is the script `docs/alexnet.py`. `make notebook` runs it and writes `docs/alexnet.ipynb`.

# %%
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, display

if not Path("tools").is_dir():  # Jupyter starts in docs/
    os.chdir("..")
sys.path.insert(0, os.getcwd())

DATA = Path("data/sample-256")
RUNS = Path("runs")
STEPS = 120  # optimizer steps of the training in part 4


def show(figure):
    """Shows a matplotlib figure below the cell."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=90)
    display(Image(data=png.getvalue()))


# %% [markdown]
# ## 1. The eigenbasis, and what lighting noise does
#
# The pixels of all training images are points in RGB space. Their covariance has three eigenvectors. The first is
# close to grey: most of the variance between pixels is brightness. The bars below show the three vectors, with the
# standard deviation along each.
#
# Lighting noise moves all pixels of an image by one random colour along these vectors (paper section 4.1). The paper
# multiplies by eigenvalues of pixels from 0 to 1. The released code multiplies by standard deviations of pixels from 0
# to 255, and divides the image by 1.1. The code's noise is about twice as strong along the first vector.

# %%
from pipeline.rgb_pca import load_for
from pipeline.shards.reader import open_shards
from tools.shared.figures.augmentations import augmentations_figure
from tools.shared.figures.predictions import stored_image

shards = open_shards(DATA / "train")
basis = load_for(shards)
show(augmentations_figure(stored_image(shards, 0), basis))

# %% [markdown]
# The offsets of 1,000 images in both conventions. Their standard deviations along the eigenvectors are what the
# formulas say.

# %%
from pipeline.loader.augment import Lighting, draw

draws = draw(seed=0, epoch=0, ids=np.arange(1000))
for convention in ("source2012", "paper"):
    offsets, divisor = Lighting(convention).offsets_and_divisor(draws.normals, basis)
    along = (offsets / divisor) @ basis.eigenvectors
    print(f"{convention:<10}", "sd along p1, p2, p3, in pixel values:", along.std(axis=0).round(2))

# %% [markdown]
# ## 2. Two towers
#
# A GTX 580 had 3 GB of memory, too little for the network. So the paper put half of the feature maps on each of two
# GPUs. The towers read each other's activations only before conv3 and before the fully connected layers.
#
# Below, the exchange between the towers is recorded in a forward pass.

# %%
from model.alexnet import AlexNet
from model.recipe import SOURCE2012
from model.shapes import NetSpec, layer_table

model = AlexNet(NetSpec(classes=1000), SOURCE2012).eval()
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
for shape in layer_table(model.spec, SOURCE2012):
    reads = "both towers" if shape.reads_both else "its own tower"
    print(f"{shape.name}  {shape.out_channels:>4} per tower, reads {reads}")


def recording(activations, name):
    """The exchange of one process that holds both towers: nothing is sent, but the sizes are printed."""
    print(f"before {name}: each tower sends {activations[0].numel() // 2:,} numbers an image")
    return activations


images = torch.randn(2, 3, 224, 224) * 50
with torch.no_grad():
    logits = model(images, exchange=recording)

# %% [markdown]
# Restricted connectivity, seen in numbers: tower 1's first layer is changed. Which activations of tower 0 change?

# %%
outputs = {}


def remember(name):
    """A hook that stores what a layer gives."""
    return lambda layer, inputs, output: outputs.setdefault(name, []).append(output[:, : output.shape[1] // 2])


hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in ("conv1", "conv2", "conv3")]
with torch.no_grad():
    model(images)
    half = len(model.conv1.weight) // 2
    model.conv1.weight[half:] *= -1
    model(images)
for name, (before, after) in outputs.items():
    print(f"{name} of tower 0:", "the same" if torch.equal(before, after) else "changed")
for hook in hooks:
    hook.remove()

# %% [markdown]
# ## 3. A planted stall
#
# A trainer that could take 20,000 images a second, and a loader with one thread: training must wait for its input. The
# report compares the loader alone (supply), the trainer alone (demand) and both together. AU (accelerator utilisation)
# is together / demand.

# %%
from pipeline.diagnosis.quick import diagnose_loader
from pipeline.diagnosis.screen import format_findings
from pipeline.loader.settings import LoaderSettings

findings = diagnose_loader(shards, basis, LoaderSettings(batch=64, threads=1), demand_img_s=20_000, window_s=0.3)
print(format_findings(findings))

# %% [markdown]
# ## 4. What the first layer learns
#
# A network of an eighth of the width trains on the sample for a minute. At full width and on ImageNet, the paper's
# Figure 3 shows edges on one GPU and colours on the other.

# %%
command = [sys.executable, "tools/train.py", str(DATA / "train"), "--width", "0.125", "--batch", "64"]
command += ["--steps", str(STEPS), "--runs", str(RUNS), "--run-name", "notebook", "--stall-seconds", "0"]
shutil.rmtree(RUNS / "notebook", ignore_errors=True)  # of an earlier pass
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout[-300:], done.stderr[-300:])

# %%
from model.checkpoint import latest, load_model
from model.recipe import RECIPES
from model.runs import RunFolder
from tools.shared.figures.curves import curves_figure
from tools.shared.figures.kernels import kernels_figure

run = RunFolder(RUNS / "notebook")
show(curves_figure({"notebook": run.metrics()}))
trained = load_model(latest(run.checkpoints), RECIPES)
show(kernels_figure(trained.conv1.weight, 2, f"First-layer kernels after {STEPS} steps"))
