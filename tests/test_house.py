"""The README is correct: files, links, options; rooms import only downwards."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lora_exp.config.door import CONF
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
TREE_LINES = re.findall(r"^( *)([\w./]+)  +\S", README.split("## The house")[1], re.M)
PACKAGE_NAMES = [
    name for indent, name in TREE_LINES if indent
]  # the package's modules, highest first
ROOM_ORDER = [
    "__init__",
    "hydra_plugins",
    *(name.rstrip("/").removesuffix(".py") for name in PACKAGE_NAMES),
]
PACKAGE = ROOT / "lora_exp"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
PAGES = sorted(
    path
    for folder in (".", "docs", ".github")
    for path in (ROOT / folder).rglob("*.md")
    if folder != "." or path.parent == ROOT
)
# group of conf/ -> its room; presets in experiment/ choose options of all groups
ROOM_OF_GROUP = {
    "data": "data", "model": "model", "quant": "model", "peft": "adapter", "targets": "adapter",
    "algorithm": "algorithm", "tracking": "tracking",
    "early_stopping": "early_stopping", "parallel": "parallel",
}  # fmt: skip
# modules without their own test file, by room, and why
TESTED_ELSEWHERE = {
    "": {"errors"},  # every room's tests expect its errors
    "cli": {"use"},  # in after/: test_chat.py, test_serving.py, test_completion.py
    "record": {"summary", "card"},  # whole runs in test_experiment.py write them
    # alone in every run, on a seat in lockstep/test_contract.py; the loop in every run
    # processes: whole runs in parallel/test_launch.py
    # preparation: in every run; what it refuses, in model/test_packing.py and test_vocabulary.py
    "training": {"place", "loop", "processes", "preparation"},
    # whole packs in lockstep/test_contract.py run these, the launcher's tests the last
    "lockstep": {"linear", "body", "passes", "seat", "fusing"},
    # proofs are tested in test_merging.py, the others with their commands
    "after": {"proof", "soundness", "conversation", "endpoints", "pages", "verdict"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere: in functions, and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def room_of(module: str) -> str:
    top, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if top == "lora_exp" else top


def test_a_room_imports_only_rooms_below_it() -> None:
    for module, path in MODULES.items():
        room = room_of(module)
        for imported_room in map(room_of, imported(path)):
            assert ROOM_ORDER.index(imported_room) >= ROOM_ORDER.index(room), (
                f"{module} imports up, from {imported_room}"
            )


def test_there_are_no_import_cycles() -> None:
    graph = {module: set(imported(path)) - {module} for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_file_tree_lists_every_room_and_only_existing_files() -> None:
    existing = {f"{room.name}/" for room in ROOMS} | {path.name for path in PACKAGE.glob("*.py")}
    assert set(PACKAGE_NAMES) == existing - {"__init__.py"} | {"assets/"}
    for name in (name for indent, name in TREE_LINES if not indent):
        assert (ROOT / name).exists(), name
    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir()}
    assert {name for _, name in TREE_LINES if name.startswith("scripts/")} == scripts


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_has_a_docstring_that_lists_its_files(room: Path) -> None:
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    listed = re.findall(r"^(\w+)  +(\S.*)", docstring, re.M)
    assert docstring.splitlines()[0].endswith(".")
    assert sorted(name for name, _ in listed) == sorted(
        path.stem for path in room.glob("*.py") if path.name != "__init__.py"
    )
    assert all(len(words.split()) <= 6 for _, words in listed)


def test_every_group_of_conf_has_its_room() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups - {"experiment"} == set(ROOM_OF_GROUP)
    for group, room in ROOM_OF_GROUP.items():
        assert (PACKAGE / room / "__init__.py").is_file()
        for path in (CONF / group).glob("*.yaml"):
            rooms = set(re.findall(r"_target_:\s*lora_exp\.(\w+)", path.read_text()))
            assert rooms <= {room}, f"{path}: {rooms}"


def test_every_option_is_in_the_readme() -> None:
    for path in CONF.glob("*/*.yaml"):
        row = next(
            line for line in README.splitlines() if line.startswith(f"| `{path.parent.name}`")
        )
        assert re.search(rf"\b{re.escape(path.stem)}\b", row), path


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub, and our site as it does, makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-")
        names = itertools.chain([slug], (f"{slug}-{n}" for n in itertools.count(1)))
        slugs.add(next(name for name in names if name not in slugs))
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_a_target(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_equal_headings_have_different_anchors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# W&B\n## `a.b` & c\n## [A](b.md) 一\n## W&B\n```\n# none\n```\n")
    assert anchors(page) == {"wb", "ab--c", "a-一", "wb-1"}


def test_option_files_are_short_and_begin_with_a_comment() -> None:
    for path in CONF.glob("*/*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 22, path
        assert lines[0].startswith("# "), path
        if lines[0] == "# @package _global_" and len(lines) > 2:
            assert lines[1].startswith("# "), path


def test_tests_mirror_the_rooms_and_every_module_has_its_tests() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - {"gpu"} == {room.name for room in ROOMS}  # which every room shares
    for room in ("", *sorted(folders)):
        modules = {path.stem.strip("_") for path in (PACKAGE / room).glob("*.py")} - {"init"}
        tested = {path.stem[5:] for path in (ROOT / "tests" / room).glob("test_*.py")}
        assert modules - tested == TESTED_ELSEWHERE.get(room, set()), room
