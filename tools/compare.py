"""Compares two stall reports: what changed, what of it is noise, and whether training or its loader became slower.

    python tools/compare.py runs/before runs/after
    python tools/compare.py before.json after.json --tolerance 0.02

BEFORE and AFTER are folders of runs with a stall.json, or files: a stall.json, or what bench_loader.py --json wrote. A
regression is a decline of `together`, AU or `supply` by more than the tolerance whose 95% confidence interval does not
contain 0. A decline of AU does not count if `together` rose: a faster training step lowers AU.

Exit codes: 0 no regression; 1 a regression; 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from model.runs import STALL
from tools.shared.cli import json_path, parser_of, require_at_least, run, write_json


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("before", type=Path, metavar="BEFORE", help="folder of a run, or stall report, to compare with")
    add("after", type=Path, metavar="AFTER", help="folder of a run, or stall report, that may be slower")
    add("--tolerance", type=float, default=0.05, metavar="SHARE", help="decline that is allowed; default: %(default)s")
    add("--json", type=json_path, metavar="FILE", help="write the comparison as JSON")
    return parser


def read_report(path: Path) -> dict[str, Any]:
    """Reads the stall report of a run's folder, or of a file.

    Raises:
        ValueError: there is none.
    """
    from pipeline.diagnosis.compare import check_report

    file = path / STALL if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise ValueError(f"{path}: no {STALL} in this folder; train.py --resume makes a missing report")
        raise ValueError(f"{path}: not found; expected the folder of a run, or a stall report (bench_loader.py --json)")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(
            f"{file}: no JSON ({error}); expected a stall report of train.py or bench_loader.py"
        ) from error
    return check_report(found, str(file))


def main() -> int:
    """Compares two stall reports and returns the exit code."""
    args = arguments().parse_args()
    require_at_least(0, tolerance=args.tolerance)
    if args.tolerance >= 1:
        raise ValueError(f"--tolerance {args.tolerance:g}: expected a share below 1, such as 0.05")
    from pipeline.diagnosis.compare import compare, format_comparison  # imports SciPy

    before, after = read_report(args.before), read_report(args.after)
    found = compare(before, after, args.tolerance)
    print(format_comparison(found))
    write_json(args.json, {"before": str(args.before), "after": str(args.after), **found.record()})
    return 1 if found.regressions else 0


if __name__ == "__main__":
    run(main)
