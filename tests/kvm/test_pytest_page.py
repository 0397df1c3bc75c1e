"""docs/test-with-pytest.md is a test file that passes."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "test-with-pytest.md"
LINUX = "linux"  # in the names of those of its tests that boot one

pytest_plugins = ["pytester"]


def run_page(pytester: pytest.Pytester, choice: str) -> pytest.RunResult:
    blocks = PAGE.read_text().split("```python\n")[1:]
    pytester.makepyfile(test_page="\n".join(block.split("```")[0] for block in blocks))
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", choice, timeout=600)


def test_the_page_s_tests_pass(pytester: pytest.Pytester) -> None:
    run_page(pytester, f"not {LINUX}").assert_outcomes(passed=11, deselected=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_s_linux_test_passes(pytester: pytest.Pytester) -> None:
    run_page(pytester, LINUX).assert_outcomes(passed=2, deselected=11)
