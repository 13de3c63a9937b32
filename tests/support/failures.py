"""A failure is printed when it happens: the rest of the suite takes minutes."""

from __future__ import annotations

import pytest


class Failures:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # none in the processes that run tests for another
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.line("")
            reporter.section(f"{report.nodeid} ({report.when})", sep="_")
            reporter.write_line(report.longreprtext)


def print_at_once(config: pytest.Config) -> None:
    """For `pytest_configure` of a conftest.py; twice is once."""
    if not config.pluginmanager.has_plugin("failures"):
        config.pluginmanager.register(Failures(config), "failures")
