"""A pytest plugin that shows a failure when it happens: a run in a test host is long, and may not come to its summary.

It is loaded before pytest-xdist tells its processes apart; the one that runs no tests itself, or the only one, prints.
"""

from __future__ import annotations

import pytest


class _Printer:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)  # after the line that says FAILED
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the failed phase's traceback and what the test wrote."""
        if not report.failed:
            return
        self._terminal.ensure_newline()
        self._terminal.section(f"{report.nodeid} ({report.when}, {report.duration:.0f} s)", sep="-")
        self._terminal.write_line(report.longreprtext)
        for title, content in report.sections:
            self._terminal.write_line(f"{title}:\n{content.rstrip()}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Print through the terminal reporter; a worker of pytest-xdist has none."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Printer(terminal))
