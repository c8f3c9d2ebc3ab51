"""Every command that the documents show, and how tests/test_docs.py checks it: it runs, or its options are compared.

A command that is in no table fails a test until someone has decided how it is checked.
"""

from __future__ import annotations

SAMPLE_NET = "runs/sample/checkpoints/step-000000560"  # the last checkpoint of `make train`
EARLIER_NET = "runs/sample/checkpoints/step-000000532"

# Options that make a command small enough for a test; they are appended, and the last value of an option counts.
SMALL = {
    "make_sample": "--workers 1",
    "make_shards": "--workers 1 --shard-samples 20",
    "compute_pca": "--workers 1",
    "bench_loader": "--batch 8 --seconds 0.02",
    "train": "--width 0.05 --batch 8 --steps 2 --stall-seconds 0.05 --device cpu",
    "figures": "",
    "evaluate": "--batch 10 --device cpu",
    "predict": "--device cpu",
}

SAMPLE_NET = "runs/sample/checkpoints/step-000000560"  # the last checkpoint of `make train`
EARLIER_NET = "runs/sample/checkpoints/step-000000532"

# Commands that run here, in the order of their document.
RUN = {
    "python tools/make_shards.py /folder/of/imagenet data/imagenet-256",
    "python tools/compute_pca.py data/imagenet-256/train",
    "python tools/bench_loader.py data/imagenet-256/train",
    "python tools/train.py data/imagenet-256/train --val data/imagenet-256/val --run-name first",
    "python tools/evaluate.py data/imagenet-256/val runs/first/checkpoints/step-000910819 --views 10",
    "python tools/make_shards.py data/imagenet-256 --verify",
    "python tools/bench_loader.py data/imagenet-256/train --demand 2500 --au-threshold 0.95",
    "python tools/bench_loader.py data/imagenet-256/train --demand 2500 --tune tuned.json",
    "python tools/train.py data/imagenet-256/train --run-name tuned --tuned tuned.json",
    "python tools/make_shards.py /data/imagenet data/imagenet-256",
    "python tools/make_sample.py data/sample --classes 4 --train 40 --val 10",
    "python tools/make_shards.py data/sample data/imagenet-256 --shard-samples 40",
    "python tools/make_shards.py data/imagenet-256 --verify --deep",
    "python tools/train.py data/imagenet-256/train --val data/imagenet-256/val --run-name no-lrn --change no-lrn",
    f"python tools/evaluate.py data/sample-256/val {SAMPLE_NET}",
    f"python tools/evaluate.py data/sample-256/val {SAMPLE_NET} --views 10",
    f"python tools/evaluate.py data/sample-256/val {EARLIER_NET} {SAMPLE_NET}",
    f"python tools/evaluate.py data/sample-256/val {EARLIER_NET} {SAMPLE_NET} --fit-weights data/sample-256/train",
    f"python tools/evaluate.py data/sample-256/val {SAMPLE_NET} --per-class classes.csv --confusion confusion.svg",
    f"python tools/predict.py photo.jpg --checkpoint {SAMPLE_NET}",
    f"python tools/predict.py photo.jpg --checkpoint {SAMPLE_NET} --views 10 --json photo.json",
    f"python tools/predict.py photo.jpg --checkpoint {SAMPLE_NET} --features fc7 --out features.npy",
    f"python tools/train.py data/photos-256/train --val data/photos-256/val --run-name tuned --width 0.125 "
    f"--init-from {SAMPLE_NET} --freeze convolutions",
    f"python tools/figures.py kernels {SAMPLE_NET} --out kernels.png",
    f"python tools/figures.py top5 {SAMPLE_NET} data/sample-256/val --out top5.png",
    "python tools/figures.py augmentations photo.jpg data/sample-256/train --out augmentations.png",
}

# Commands of docs/clusters.md, in parts.
SHARED_SHARDS = "python tools/make_shards.py /shared/imagenet /shared/imagenet-256"
SHARED_TRAINING = (
    "--nproc-per-node 4 --master-addr node1 --master-port 29500 tools/train.py /shared/imagenet-256/train"
    " --runs /shared/runs --run-name first --resume"
)

# Commands whose options are compared with the tool's parser only, and why they do not run here.
PARSED = {
    "torchrun --nproc-per-node 2 tools/train.py data/imagenet-256/train --val data/imagenet-256/val --run-name pair": (
        "tests/model/parallel runs it"
    ),
    "python tools/make_shards.py PHOTOS OUT --workers 1": "needs photographs",
    "python tools/make_shards.py PHOTOS OUT --workers 2": "needs photographs",
    "python tools/make_shards.py /data/imagenet data/imagenet-256 --repair": "tests/pipeline/shards runs it",
    "python tools/bench_resize.py PHOTOS": "needs photographs",
    "python tools/bench_resize.py IMAGES --images 100 --rounds 10": "needs photographs",
    "python tools/bench_baselines.py SHARDS": "tests/tools runs it",
    "python tools/bench_pca.py SHARDS --workers 1": "tests/tools runs it",
    "python tools/bench_sharding.py PHOTOS": "tests/tools runs it",
    "python tools/bench_sharding.py PHOTOS --images 20000 --rounds 1": "takes minutes",
    "python tools/bench_towers.py": "takes minutes",
    "python tools/bench_towers.py --batch 32": "takes minutes",
    "python tools/bench_loader.py data/sample-256/train --trainer --width 0.125 --batch 64": "takes minutes",
    "python tools/train.py data/sample-256/train --run-name first": "README.md has the same",
    "python tools/bench_loader.py data/sample-256/train": "README.md has the same",
    "python tools/bench_loader.py data/sample-256/train --demand 2500": "README.md has the same",
    "python tools/bench_loader.py data/sample-256/train --demand 2500 --plot s.svg": "tests/tools runs it",
    "python tools/bench_loader.py data/sample-256/train --trainer --width 0.125": "tests/tools runs it",
    "python tools/bench_loader.py SHARDS --demand 2500": "README.md has the same",
    "python tools/bench_loader.py SHARDS --threads 2": "README.md has the same",
    "python tools/bench_loader.py data/sample-256/train --loader webdataset": "tests/tools runs it",
    "python tools/bench_loader.py --loader my_loaders:make_loader": "tests/tools runs it",
    "python tools/bench_loader.py --loader my_loaders:make_loader --demand 2500": "tests/tools runs it",
    (
        "python tools/train.py data/sample-256/train --val data/sample-256/val --run-name portable --loader webdataset"
    ): "tests/tools runs it",
    "python tools/bench_loader.py SHARDS --cold": "needs a set on a real disk",
    "python tools/make_shards.py cifar-10k data/cifar-256": "needs CIFAR-10",
    "python tools/compute_pca.py data/cifar-256/train": "needs CIFAR-10",
    "python tools/learning_table.py data/cifar-256/train --val data/cifar-256/val": "takes hours",
    "python tools/train.py data/fall2011-256/train --run-name pre --change sixth-conv": "tests/tools runs it",
    (
        "python tools/train.py data/imagenet-256/train --run-name star --change sixth-conv "
        "--init-layers convolutions --init-from runs/pre/checkpoints/step-000910819"
    ): "tests/tools runs it",
    (
        "python tools/train.py data/imagenet-256/train --val data/imagenet-256/val --run-name tracked --tensorboard"
    ): "tests/tools runs it",
    (
        "python tools/train.py data/imagenet-256/train --val data/imagenet-256/val --run-name watched --prometheus"
    ): "tests/tools runs it",
    "python tools/compare.py runs/before runs/after": "tests/tools runs it",
    "python tools/compare.py before.json after.json --tolerance 0.02": "tests/tools runs it",
    f"torchrun --nproc-per-node 2 tools/evaluate.py data/sample-256/val {SAMPLE_NET} --views 10": "tests/tools runs it",
    f"python tools/export.py {SAMPLE_NET} alexnet.pt2": "tests/tools runs it",
    "python tools/make_shards.py /folder/of/photos data/photos-256": "needs photographs",
    "python tools/compute_pca.py data/photos-256/train": "needs photographs",
    (
        "torchrun --nproc-per-node 2 tools/train.py data/imagenet-256/train --val data/imagenet-256/val "
        "--run-name cnn-1 --seed 1"
    ): "needs ImageNet",
    (
        "torchrun --nproc-per-node 2 tools/train.py data/imagenet-256/train --val data/imagenet-256/val "
        "--run-name no-lrn-1 --seed 1 --change no-lrn"
    ): "needs ImageNet",
    (
        "python tools/evaluate.py data/imagenet-256/val runs/cnn-1/checkpoints/step-000910819 --views 10 "
        "--json cnn-1.json"
    ): "needs ImageNet",
    "python tools/evaluate.py data/imagenet-256/val "
    + " ".join(f"runs/cnn-{number}/checkpoints/step-000910819" for number in range(1, 6))
    + " --views 10": "needs ImageNet",
    (
        "python tools/figures.py relu-tanh cifar10 --trial-epochs 1 --epochs 50 --out docs/relu-tanh.svg "
        "--json docs/relu-tanh.json"
    ): "needs CIFAR-10; tests/tools runs it",
    "python tools/figures.py relu-tanh --from-json docs/relu-tanh.json --out relu-tanh.svg": "tests/tools runs it",
    (
        f"python tools/figures.py neighbours {SAMPLE_NET} data/sample-256/train --queries data/sample-256/val "
        "--out neighbours.png"
    ): "tests/tools runs it",
    "python tools/figures.py curves runs/sample --out curves.svg": "tests/tools runs it",
    **{f"{SHARED_SHARDS} --part {n}/3": "tests/tools runs it" for n in (1, 2, 3)},
    f"{SHARED_SHARDS} --engine tcp://first:8786": "tests/tools runs it",
    "python tools/compute_pca.py /shared/imagenet-256/train --engine tcp://first:8786": "needs a cluster",
    f'for n in 1 2 3; do ssh node$n "cd /shared/alexnet && .venv/bin/{SHARED_SHARDS} --part $n/3" & done; wait': "ssh",
    **{f"torchrun --nnodes 2 --node-rank {n} {SHARED_TRAINING}": "needs two machines" for n in (0, 1)},
    "python -m tests.soak.scale": "takes minutes; tests/pipeline/loader/test_scale.py runs its small form",
    "python -m tests.soak.plan": "takes minutes",
    "python -m tests.soak.damaged_images": "takes minutes",
    "python -m tests.soak.damaged_images --rounds 32 --seed 7": "takes minutes",
    "python -m tests.soak.kill_shards --runs 200": "takes hours",
    "python -m tests.soak.kill_ranks --runs 50": "takes minutes",
    "python -m tests.soak.random_stops --rounds 100": "takes minutes",
    "python -m tests.soak.planted_stalls SHARDS": "takes minutes",
    "python -m tests.soak.system_stalls SHARDS": "takes minutes",
    "python -m tests.soak.planted_stalls SHARDS --runs 5 --seconds 0.4": "takes minutes",
}

# Commands of Docker; tests/test_docker.py compares the files that they use with the project.
DOCKER = {
    "docker compose up train",
    "docker compose stop train",
    "docker compose -f compose.yaml -f docker/compose.cpu.yaml up train",
}

ENTRIES = RUN | set(PARSED) | DOCKER
