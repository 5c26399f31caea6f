"""The front door tells the truth: files, links, options and the way imports point."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lora_exp.config.door import CONF
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
LINES = re.findall(r"^( *)([\w./]+)  +\S", README.split("## The house")[1], re.M)
FOLDERS = [""]
for indent, name in LINES:  # a folder's lines stand four deep below it
    FOLDERS.append(name if len(indent) == 2 else FOLDERS[-1])
PAIRS = zip(LINES, FOLDERS[1:], strict=True)
TREE = [f"{folder}{name}" if len(indent) == 4 else name for (indent, name), folder in PAIRS]
ORDER = [name.removesuffix(".py") for name in TREE if name.endswith(".py") and name != "run.py"]


def test_every_module_stands_in_the_file_tree_and_every_line_exists() -> None:
    package = ROOT / "lora_exp"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    modules -= {"__init__.py", "lockstep/__init__.py", "after/__init__.py"}
    assert {name for name in TREE if name.endswith(".py")} == modules | {"run.py"}
    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir()}
    assert {name for name in TREE if name.startswith("scripts/")} == scripts


def test_imports_point_one_way_down_the_file_tree() -> None:
    for name in ORDER:
        for node in ast.walk(ast.parse((ROOT / "lora_exp" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_exp."):
                module = node.module.removeprefix("lora_exp.").replace(".", "/")
                inside = [f"{module}/{alias.name}" for alias in node.names]
                for imported in [module] if module in ORDER else inside:
                    late = name == "config" and imported in ("validation", "mistakes")  # compose
                    assert ORDER.index(imported) < ORDER.index(name) or late, f"{name}: {imported}"


def test_every_option_stands_in_the_readme() -> None:
    for path in CONF.glob("*/*.yaml"):
        row = next(
            line for line in README.splitlines() if line.startswith(f"| `{path.parent.name}`")
        )
        assert re.search(rf"\b{path.stem}\b", row), path


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT) for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_option_files_are_short_and_say_what_they_are() -> None:
    for path in CONF.glob("*/*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 22, path
        assert lines[0].startswith("# "), path
        if lines[0] == "# @package _global_" and len(lines) > 2:
            assert lines[1].startswith("# "), path


def test_every_module_has_its_tests() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    # these are walked by whole runs in test_experiment.py, and their files are held there
    untested = {name.replace("/", "_") for name in ORDER} - tested
    untested -= {"errors", "summary", "card", "__main__", "validation"}
    # and these by whole packs in test_lockstep_pack.py
    untested -= {f"lockstep_{name}" for name in ("segment", "linear", "body", "seat")} | {"place"}
    # a proof is of a merge, the others are seen from the commands
    untested -= {
        f"after_{name}" for name in ("proof", "soundness", "conversation", "endpoints", "pages")
    }
    assert not untested
