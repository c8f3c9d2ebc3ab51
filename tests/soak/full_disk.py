"""Shards onto a disk that is too small, makes it larger, and shards again. Needs the right to mount a tmpfs.

    python tests/long_full_disk.py

The first run must end with code 2 and one line that names the full disk; the second must complete, to the bytes that a
run with room enough writes. Prints what it saw; exits with 1 where that is something else.
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
        sys.exit(f"no tmpfs can be mounted here ({done.stderr.strip()}); run this as root")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root, small = Path(folder), Path(folder) / "small"
        small.mkdir()
        tool("make_sample", root / "sample", "--classes", 3, "--train", 40, "--val", 4)
        assert tool("make_shards", root / "sample", root / "whole", "--shard-samples", 10).returncode == 0
        mount(small, "size=1m")
        try:
            for workers in (1, 2):
                full = tool("make_shards", root / "sample", small, "--shard-samples", 10, "--workers", workers)
                said = full.stderr.splitlines()[-1]
                print(f"a disk of 1 MB, {workers} workers: code {full.returncode}, {said.replace(folder, '')}")
                if full.returncode != 2 or not said.endswith("No space left on device") or "Traceback" in full.stderr:
                    return 1
            mount(small, "remount,size=64m")
            again = tool("make_shards", root / "sample", small, "--shard-samples", 10)
            equal = files_of(small) == files_of(root / "whole")
            print(f"64 MB, the same command: code {again.returncode}, {'the same' if equal else 'OTHER'} bytes")
            return 0 if again.returncode == 0 and equal else 1
        finally:
            subprocess.run(["umount", small], check=True)


if __name__ == "__main__":
    sys.exit(main())
