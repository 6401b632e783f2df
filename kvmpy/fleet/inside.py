# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the session on a host: the lab's, with a folder of its own and the host's compiler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpy.fleet.session import JOB_VARIABLE
from kvmpy.lab.inside import Worker
from kvmpy.testing.journal import Journal


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin object; the journal is the channel to the run."""
    journal = config.pluginmanager.get_plugin("kvmpy-journal")
    if not isinstance(journal, Journal):
        raise pytest.UsageError("kvmpy.fleet.inside needs --kvmpy-journal")
    folder = Path(os.environ[JOB_VARIABLE])
    config.pluginmanager.register(Worker(journal, folder, compiles=True), "kvmpy-fleet-inside")
