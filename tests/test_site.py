"""The docs site is built from the same pages, with valid links and all public names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs", reason="the site is not built: install the extra docs")
pytest.importorskip("mkdocstrings", reason="the site is not built: install the extra docs")


def test_the_site_is_built_without_a_warning_and_shows_the_public_names(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, str(ROOT / "scripts/docs"), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (site / "docs/reference/index.html").read_text()
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.M):
        assert f'id="{name}"' in page
    assert (site / "index.html").is_file()
    assert (site / "docs/decisions/0010-rooms/index.html").is_file()
