"""Shards onto a disk that is too small, enlarges it, and shards again. Requires permission to mount a tmpfs.

    python -m tests.soak.full_disk

The first runs must exit with code 2 and one line that names the full disk. The last run must complete, with the same
bytes as a run on a large disk. Prints each result. Exits with 1 if a result is unexpected.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.shard_fixtures import files_of

ROOT = Path(__file__).parents[2]


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cannot mount a tmpfs ({done.stderr.strip()}); run this as root")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root, small = Path(folder), Path(folder) / "small"
        small.mkdir()
        tool("make_sample", root / "sample", "--classes", 3, "--train", 40, "--val", 4)
        assert tool("make_shards", root / "sample", root / "large", "--shard-samples", 10).returncode == 0
        mount(small, "size=1m")
        try:
            for workers in (1, 2):
                full = tool("make_shards", root / "sample", small, "--shard-samples", 10, "--workers", workers)
                message = full.stderr.splitlines()[-1]
                print(f"disk of 1 MB, {workers} workers: code {full.returncode}, {message.replace(folder, '')}")
                one_line = message.endswith("No space left on device") and "Traceback" not in full.stderr
                if full.returncode != 2 or not one_line:
                    return 1
            mount(small, "remount,size=64m")
            again = tool("make_shards", root / "sample", small, "--shard-samples", 10)
            equal = files_of(small) == files_of(root / "large")
            print(f"disk of 64 MB, same command: code {again.returncode}, {'same' if equal else 'DIFFERENT'} bytes")
            return 0 if again.returncode == 0 and equal else 1
        finally:
            subprocess.run(["umount", small], check=True)


if __name__ == "__main__":
    sys.exit(main())
