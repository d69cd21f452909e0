"""``fastkd env``: what a bug report needs."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the sub-parser of ``fastkd env``."""
    parser = commands.add_parser("env", help="print what a bug report needs")
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    from fastkd.ops.environment import report

    print(report())
    return 0
