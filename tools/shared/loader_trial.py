"""bench_loader.py --loader package.module:function: any iterable of batches on trial.

The function takes no argument and returns the loader. Nothing is imported for it but what its module imports.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NoReturn

from tools.shared.cli import Progress, write_json

LIBRARIES = ("dali", "webdataset")
SHARDS_ONLY = {
    "shards": None,
    "eigenbasis": None,
    "device": None,
    "threads": None,
    "hw_decoder_load": None,
    "order": None,
    "cold": False,
    "trainer": False,
    "plot": None,
    "verify": False,
    "tune": None,
}
"""Options that say something about a shard set or this project's network, with the value of each if it is not given."""


def is_foreign(loader: str) -> bool:
    """Whether `--loader` names a function that makes a loader."""
    return ":" in loader


def check_loader(arguments: argparse.Namespace) -> None:
    """Checks `--loader` and the options that go with it.

    Raises:
        ValueError: it is unknown, not installed, or contradicts another option.
    """
    loader = arguments.loader
    if not is_foreign(loader):
        if loader not in LIBRARIES:
            expected = f"expected {', '.join(LIBRARIES)}, or package.module:function"
            raise ValueError(f"--loader {loader}: unknown; {expected}, which makes the loader")
        if arguments.shards is None:
            raise ValueError("SHARDS is missing: name the folder of a shard set, or --loader package.module:function")
        from pipeline.loader.settings import check_library

        return check_library("webdataset" if loader == "webdataset" else "dali")
    for name, absent in SHARDS_ONLY.items():
        if getattr(arguments, name, absent) != absent:
            option = "SHARDS" if name == "shards" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect on --loader {loader}, which makes its own batches; omit it")
    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch}: expected at least 1")


def put_on_trial(arguments: argparse.Namespace) -> int:
    """Measures the loader that a function makes, prints the report and returns the exit code."""
    name = arguments.loader
    make = function_of(name)
    try:
        return _measured(arguments, make)
    except ValueError as error:
        raise ValueError(f"--loader {name}: {_last_line(error)}") from error
    except Exception as error:
        _refuse(name, error)


def _measured(arguments: argparse.Namespace, make: Callable[[], Iterable[Any]]) -> int:
    from pipeline.diagnosis.any_loader import describe, diagnose, measure_alone
    from pipeline.diagnosis.loader_rules import cause_of_slow_loader
    from pipeline.profiling.windows import WINDOW_ROUNDS

    how = {"batch": arguments.batch, "window_s": arguments.seconds}
    record: dict[str, Any] = {"loader": arguments.loader, **how}
    with Progress("measuring", WINDOW_ROUNDS, "rounds") as progress:
        if arguments.demand is None:
            evidence, observed = measure_alone(make, progress=progress, **how)
        else:
            step = _sleeping_step(arguments.demand, arguments.batch)
            found = diagnose(make, step, au_threshold=arguments.au_threshold, progress=progress, **how)
    if arguments.demand is None:
        cause = cause_of_slow_loader(evidence)
        print(f"supply     {evidence.supply:10,.0f} img/s  the loader alone")
        print("\n".join([*describe(evidence, observed), f"limit      {cause.name}: {cause.because}"]))
        print("           add --demand IMG_S for the stall report of a trainer of that throughput")
        record |= {"supply": evidence.supply, "cpu_ms": evidence.cpu_ms, "limit": cause.name}
    else:
        print(found)
        record |= found.record()
    print(json.dumps(record))
    write_json(arguments.json, record)
    return int(arguments.demand is not None and found.account.au < arguments.au_threshold)


def _sleeping_step(demand: float, batch: int | None) -> Callable[[Any], None]:
    """A training step that only sleeps: it takes no core."""
    from pipeline.profiling.any_loader import images_of

    def step(one: Any) -> None:
        time.sleep((images_of(one) if batch is None else batch) / demand)

    return step


def function_of(name: str) -> Callable[[], Iterable[Any]]:
    """The function that `package.module:function` names; modules are found from the current folder, too.

    Raises:
        ValueError: there is none.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise ValueError(f"--loader {name}: expected package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        own = module_name.startswith(missing)
        where = f"; searched from {os.getcwd()}" if own else f", which {module_name} imports"
        raise ValueError(f"--loader {name}: there is no module {missing}{where}") from error
    except Exception as error:
        _refuse(name, error)
    function = getattr(module, attribute, None)
    if function is None:
        names = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:5])
        raise ValueError(f"--loader {name}: {module_name} has no {attribute}; its functions are {names or 'none'}")
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"--loader {name}: {attribute} is a {kind}; expected a function that returns the loader")
    result: Callable[[], Iterable[Any]] = function
    return result


def _refuse(name: str, error: Exception) -> NoReturn:
    found = f"it raised {type(error).__name__}: {_last_line(error)}"
    raise ValueError(f"--loader {name}: {found}; set TRACEBACK=1 to see where") from error


def _last_line(error: Exception) -> str:
    """The last line of a message: a DataLoader puts the traceback of its worker before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "no message"
