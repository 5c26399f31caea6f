"""Options that several commands share: their types, the check of paths, `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_exp.files.strict import dumps


class Quant(StrEnum):
    """Quantisations of a base."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


class DeviceMap(StrEnum):
    """Where a base lies."""

    one = "one"
    auto = "auto"


SavedPath = Annotated[
    str, typer.Argument(metavar="PATH", help="an adapter, run, checkpoint or model")
]
SavedPaths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="adapters or runs of one base; NAME=PATH names one"),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="location of the base, if not the one that the adapter names: folder, hub id, option; "
        "NAME=PLACE if it has another name there"
    ),
]
QuantOption = Annotated[
    Quant | None, typer.Option(help="quantisation of the base; default: that of its run")
]
DevicesOption = Annotated[
    DeviceMap,
    typer.Option("--device-map", help="auto: a base too big for one device lies on several"),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="the folder to make")]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def on_devices(device_map: DeviceMap) -> Iterator[None]:
    """Load bases onto one device, or onto as many as they need."""
    from lora_exp.model.placement import placed

    with placed(None if device_map is DeviceMap.one else device_map.value):
        yield


def check_exists(*paths: str | Path) -> None:
    """Raise for a path that does not exist, before torch is imported, which takes seconds.

    Raises:
        SavedError: there is nothing at a path.
    """
    from lora_exp.after.saved import find_all

    for path in map(str, paths):
        if not Path(path).expanduser().exists():  # or it is NAME=PATH, or in a package
            find_all([path])


def print_result(result: Any, page: Any, as_json: bool) -> None:
    """Print JSON for programs, or a page for people."""
    if as_json:
        print(dumps(result, indent=1, default=str))
        return
    from lora_exp.record.console import console

    console.print(page(result))
