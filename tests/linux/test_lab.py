"""The lab on Linux runs and prints what its page shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import run_page

if TYPE_CHECKING:
    from vmm.linux.kernel import SmallKernel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "labs" / "10-linux.md"


@pytest.mark.timeout(600)  # three boots, one after the other
def test_the_lab_on_linux_prints_what_its_page_shows(
    small_kernel: SmallKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(PAGE)
