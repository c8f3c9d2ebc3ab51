"""What all ranks must agree on before the first step, and how a mistake on one rank gives one message."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from model.parallel.ranks import Ranks

# Options that may differ between ranks: paths of a machine, its speed, and what only the first rank reads.
MAY_DIFFER = {"shards", "val", "runs", "device", "threads", "tuned", "resume"}

Result = TypeVar("Result")


def first_rank_first(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Calls `action` on the first rank, and on the others once it has succeeded there.

    If it fails on the first rank, that rank raises the error and all others exit with 2 in silence: one mistake of the
    user gives one message.
    """
    if not ranks.first:
        if ranks.any(False):
            sys.exit(2)
        return action()
    try:
        result = action()
    except (ValueError, OSError):
        ranks.any(True)
        raise
    ranks.any(False)
    return result


def require_same_options(ranks: Ranks, args: argparse.Namespace) -> None:
    """Compares the options of all ranks; arguments and errors are those of `require_same`."""
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in MAY_DIFFER}
    require_same(ranks, "options", values | {"--val": "given" if args.val else "not given"})


def require_same(ranks: Ranks, what: str, values: dict[str, Any]) -> None:
    """Compares values of all ranks before any of them could make a rank wait for another that never comes.

    Args:
        ranks: this rank among the others.
        what: "options" or "data"; different in each call.
        values: this rank's values by name, as the user knows it.

    Raises:
        ValueError: on the first rank, if a value differs: its name, both values and where they are. The other ranks
            exit with 2 in silence.
    """
    if ranks.store is None:
        return
    own = {name: str(value) for name, value in values.items()}
    ranks.store.set(f"{what}/{ranks.place.rank}", json.dumps({"host": platform.node(), "values": own}))
    found = {rank: json.loads(ranks.store.get(f"{what}/{rank}")) for rank in range(ranks.place.world)}
    ranks.any(False)  # the rank that hosts the store must not end before all have read it
    first = found[0]
    for rank, other in found.items():
        for name, value in first["values"].items():
            if other["values"].get(name) != value:
                if not ranks.first:
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
    return isinstance(error, DistError) or "gloo" in text or "Connection closed" in text or "NCCL" in text
