"""A pytest plugin that writes every test's outcome as it happens, one JSON object a line, so that a crash loses none before it.

    python -m pytest -p benchmarks.gpu.pytest_outcomes --outcomes FILE

Imports neither torch nor Triton: tests/conftest.py must come first to say whether kernels are interpreted.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

# After one of these a process has lost its CUDA context, and every later test in it would fail for no fault of its own.
LOST_CONTEXT = (
    "an illegal memory access",
    "an illegal instruction",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
)
LOST_CONTEXT_STATUS = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="append the outcome of every test as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")), "outcomes")


class Outcomes:
    """Lines ``{"event": "collected" | "started", "test": id}``, and for a test that is over its outcome, seconds and message."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._write(event="collected", test=item.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(event="started", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or not report.passed:
            self._write(
                event="over",
                test=report.nodeid,
                outcome=report.outcome,
                seconds=round(self.seconds[report.nodeid], 3),
                message=_message(report),
            )
        if report.failed and any(sign in report.longreprtext for sign in LOST_CONTEXT):
            pytest.exit("the CUDA context is lost", LOST_CONTEXT_STATUS)

    def _write(self, **line: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped, its end where it is long; nothing for one that passed."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return report.longreprtext[-2000:]
