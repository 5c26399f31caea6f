"""The commands in the docs are valid: they compose, parse and name existing options."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

import lora_exp
from lora_exp import compose
from lora_exp.cli import app
from lora_exp.config import sharding, trackers
from lora_exp.errors import ConfigError
from tests.conftest import ROOT

PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", "AGENTS.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
RUNNERS = (["python", "run.py"], ["python", "-m", "lora_exp"], ["lora-exp", "run"])
OTHER_PROGRAMS = {"curl", "printf", "pip", "pre-commit"}  # programs that are not ours
GROUP: Any = typer.main.get_command(app)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def fenced(page: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return [block for block_language, block in blocks if block_language == language]


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of each command: the lines of shell blocks, and lines that start with `$`."""
    lines = [line for block in fenced(page, "sh") for line in join_lines(block)]
    lines += [
        line[2:] for block in fenced(page, "") for line in join_lines(block) if line[:2] == "$ "
    ]
    for line in lines:
        words = shlex.split(line, comments=True)
        for end, part in itertools.groupby(words, lambda word: word in ("&&", "|")):
            if not end:  # without variables that are set for the command
                yield list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, part))


def join_lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


SHOWN = [(page, words) for page in PAGES for words in commands(page)]
RUNS = [
    (page, words[len(start) :])
    for page, words in SHOWN
    for start in RUNNERS
    if words[: len(start)] == start
]
TOOLS = [(page, words[1:]) for page, words in SHOWN if words[0] == "lora-exp" and words[1] != "run"]


def ids(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of each job of a sweep; of a run, its own; of an interval, its start."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{o.get_key_element()}={o.value().start}"]  # type: ignore[union-attr]
        if o.is_interval_sweep()
        else [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    yield from map(list, itertools.product(*values))


@pytest.fixture
def make_files(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """Return a function that creates the rows and saved runs that a command names."""
    monkeypatch.chdir(tmp_path)

    def make(words: list[str]) -> None:
        for name in re.findall(r"\b(?:outputs|multirun)/[\w/-]+", " ".join(words)):
            folder = Path(name.removesuffix("/adapter"))
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists():
                folder.symlink_to(trained("peft=lora"))
        for name in re.findall(r"data\.path=([\w.]+)", " ".join(words)):
            Path(name).write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')

    return make


@pytest.mark.parametrize(("page", "words"), RUNS, ids=ids)
def test_a_documented_run_composes(
    page: str,
    words: list[str],
    make_files: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (trackers, sharding):
        monkeypatch.setattr(module, "find_spec", lambda name: name)  # as if all were installed
    arguments = get_args_parser().parse_args(words)  # Hydra's flags; an unknown one exits
    if page == "README.md" and "peft.lora_alpa" in " ".join(words):
        return  # a deliberate mistake, tested below
    make_files(words)
    configs = [compose(*overrides) for overrides in jobs(arguments.overrides)]
    assert configs
    assert all(cfg.name for cfg in configs)


@pytest.mark.parametrize(("page", "words"), TOOLS, ids=ids)
def test_a_documented_tool_and_its_flags_exist(
    page: str, words: list[str], make_files: Callable[[list[str]], None]
) -> None:
    command, name = GROUP.commands[words[0]], words[0]
    parsed = command.make_context(name, words[1:])
    assert parsed.info_name == name
    if name == "estimate":
        compose(*parsed.params["overrides"])


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=ids)
def test_a_documented_program_is_ours_or_known(page: str, words: list[str]) -> None:
    ours = any(words[: len(start)] == start for start in RUNNERS) or words[0] == "lora-exp"
    script = words[0].startswith("scripts/") and (ROOT / words[0]).is_file()
    assert ours or script or words[0] in OTHER_PROGRAMS
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert extra in EXTRAS


def test_the_documented_mistake_gives_the_documented_error() -> None:
    (block,) = (b for b in fenced("README.md", "") if "peft.lora_alpa" in b)
    command, _, answer = block.partition("\n")
    with pytest.raises(ConfigError) as error:
        compose(*shlex.split(command)[3:])
    assert f"ConfigError: {error.value}\n" == answer


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "python")])
def test_documented_python_imports_and_composes(
    page: str, make_files: Callable[[list[str]], None]
) -> None:
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_exp":
                assert all(hasattr(lora_exp, name.name) for name in node.names)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "compose":
                overrides = [str(ast.literal_eval(argument)) for argument in node.args]
                make_files(overrides)
                compose(*overrides)


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (
        [words for shown_page, words in SHOWN if shown_page == page] for page in PAGES[:2]
    )
    assert english[:4] == chinese[:4]
    assert english[1] == ["python", "run.py"]
