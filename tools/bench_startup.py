"""Measures how long `--help` of every tool takes, each time in a fresh process.

    python tools/bench_startup.py [--runs 5] [--json FILE]

Prints one line per tool: median, minimum and maximum seconds. A tool that takes much longer than the others imports a
heavy library (torch, DALI, numba, scipy) before its work starts. `python -X importtime tools/NAME.py --help` names it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tools.shared.cli import Progress, json_path, parser_of, require_at_least, run, write_json

TOOLS = Path(__file__).parent


def parse() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="processes per tool; default: %(default)s")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="also write what the screen says")
    return parser.parse_args()


def main() -> int:
    """Measures every tool and prints a table."""
    args = parse()
    require_at_least(1, runs=args.runs)
    tools = sorted(TOOLS.glob("*.py"))
    tools = [tool for tool in tools if tool.stem != "__init__"]
    seconds: dict[str, list[float]] = {tool.stem: [] for tool in tools}
    with Progress("measuring", args.runs * len(tools), "run") as progress:
        for _ in range(args.runs):  # interleaved, so that background load affects all tools equally
            for tool in tools:
                seconds[tool.stem].append(help_seconds(tool))
                progress(1)
    print(f"{'tool':<20}{'--help, s':>10}{'min':>7}{'max':>7}")
    for name, measured in seconds.items():
        print(f"{name:<20}{median(measured):>10.2f}{min(measured):>7.2f}{max(measured):>7.2f}")
    write_json(args.json, {"runs": args.runs, "help_s": {name: median(all_s) for name, all_s in seconds.items()}})
    return 0


def help_seconds(tool: Path) -> float:
    """Returns the seconds that a fresh process takes for `--help`. Raises OSError if it fails."""
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True)
    elapsed_s = time.perf_counter() - started_s
    if done.returncode:
        raise OSError(f"{tool.name} --help: exit code {done.returncode}, expected 0: {done.stderr.strip()[-300:]}")
    return elapsed_s


if __name__ == "__main__":
    run(main)
