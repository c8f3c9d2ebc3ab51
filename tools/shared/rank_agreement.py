"""What all ranks must agree on before the first step, and how a mistake on one rank gives one message."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from model.parallel.meeting import Meeting, OtherRankEnded

# Options that may differ between ranks: paths of a machine, its speed, and what only the first rank reads.
MAY_DIFFER = {"shards", "val", "runs", "device", "threads", "tuned", "resume"}

Result = TypeVar("Result")


def first_rank_first(meeting: Meeting, action: Callable[[], Result]) -> Result:
    """Calls `action` on the first rank, and then on the others. No rank waits with a time limit.

    If it fails on the first rank, that rank raises the error and all others exit with 2 in silence: one mistake of the
    user gives one message. If it fails on another rank, that rank raises, and the first one is silent.
    """
    result: Result | None = None
    for turn_of_first in (True, False):
        error: Exception | None = None
        if meeting.first == turn_of_first:
            try:
                result = action()
            except (ValueError, OSError) as caught:
                error = caught
            except BaseException:
                meeting.give_up()
                raise
        failed = "failed" in meeting.exchange("failed" if error else "done")
        if error:
            raise error
        if failed:
            sys.exit(2)
    return cast(Result, result)


def require_same_options(meeting: Meeting, args: argparse.Namespace) -> None:
    """Compares the options of all ranks; arguments and errors are those of `require_same`."""
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in MAY_DIFFER}
    require_same(meeting, "options", values | {"--val": "given" if args.val else "not given"})


def require_same(meeting: Meeting, what: str, values: dict[str, Any]) -> None:
    """Compares values of all ranks before any of them could make a rank wait for another that never comes.

    Args:
        meeting: this rank among the others.
        what: "options" or "data", for the message.
        values: this rank's values by name, as the user knows it.

    Raises:
        ValueError: on the first rank, if a value differs: its name, both values and where they are. The other ranks
            exit with 2 in silence.
    """
    own = {name: str(value) for name, value in values.items()}
    texts = meeting.exchange(json.dumps({"host": platform.node(), "values": own}))
    first, *others = (json.loads(text) for text in texts)
    for rank, other in enumerate(others, 1):
        for name, value in first["values"].items():
            if other["values"].get(name) != value:
                if not meeting.first:
                    sys.exit(2)
                here, there = f"rank 0 ({first['host']})", f"rank {rank} ({other['host']})"
                raise ValueError(
                    f"{name}: {value} on {here}, but {other['values'].get(name)} on {there}; "
                    f"start all ranks with the same {what}"
                )


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another rank is gone."""
    from torch.distributed import DistError

    text = str(error)
    return (
        isinstance(error, (DistError, OtherRankEnded))
        or "gloo" in text
        or "Connection closed" in text
        or "NCCL" in text
    )
