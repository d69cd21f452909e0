"""pytest plugin for runs that may be cut short: every failure is printed at once, with its reason.

`pytest -v -p tests.harness.as_it_goes`. Stops when the GPU is lost: what follows could only fail.
"""

from __future__ import annotations

import pytest

LOST = (  # after these errors every other call on the device fails, too
    "an illegal memory access",
    "an illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "unspecified launch failure",
    "device-side assert",
)
REASON_LINES = 12


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.failed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash is not None else report.longreprtext
    lines = reason.splitlines()[:REASON_LINES]
    print(f"\nFAILED {report.nodeid}", *(f"    {line}" for line in lines), sep="\n", flush=True)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None and any(text in str(call.excinfo.value) for text in LOST):
        item.session.shouldstop = f"the GPU is lost in {item.nodeid}"
