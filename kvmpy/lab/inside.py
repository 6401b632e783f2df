# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the session inside: tells the host what was collected, leaves out what is done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from kvmpy.testing import host
from kvmpy.testing.journal import Journal

DONE_VARIABLE = "KVMPY_LAB_DONE"


def _journal(config: pytest.Config) -> Journal:
    journal = config.pluginmanager.get_plugin("kvmpy-journal")
    if not isinstance(journal, Journal):
        raise pytest.UsageError("kvmpy.lab.inside needs --kvmpy-journal")
    return journal


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Describe this machine."""
    _journal(session.config).write({"event": "host", "summary": asdict(host.summarize())})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep what could not be collected for `pytest_collection_modifyitems`, which has the configuration."""
    if report.outcome != "passed":
        _UNCOLLECTED.append(report)


_UNCOLLECTED: list[pytest.CollectReport] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell what was selected, and drop what an earlier boot has done."""
    journal = _journal(config)
    for report in _UNCOLLECTED:
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        journal.write({"event": "uncollected", "data": data})
    journal.write({"event": "collected", "ids": [item.nodeid for item in items]})
    name = os.environ.get(DONE_VARIABLE)
    if name:
        done = set(json.loads(Path(name).read_text(encoding="utf-8")))
        items[:] = [item for item in items if item.nodeid not in done]
