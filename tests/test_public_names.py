"""Promises to users: public names, types in the wheel, declared dependencies."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_exp
from lora_exp import errors
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PUBLIC = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.M)
OURS = {"lora_exp", "hydra_plugins", "scripts", "tests", "benchmarks"}
PACKAGE = [
    path for folder in ("lora_exp", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")
]
FILES = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in ("", ".py")]
SCRIPTS = [
    path
    for path in FILES
    if path.is_file() and (path.suffix == ".py" or "python" in path.read_text()[:30])
]
TESTS_AND_SCRIPTS = [*(ROOT / "tests").rglob("*.py"), *SCRIPTS]
# modules that import packages of an extra; they are imported only where it is installed
NEEDED_EXTRA = {
    "lora_exp/after/evaluation.py": "eval", "lora_exp/after/endpoints.py": "serve",
    "lora_exp/search/study.py": "search", "lora_exp/lockstep/slurm.py": "cluster",
    "lora_exp/lockstep/ray.py": "ray", "lora_exp/training/zero.py": "deepspeed",
    **{f"lora_exp/tracking/{name}.py": name for name in ("tensorboard", "mlflow", "trackio")},
}  # fmt: skip
DISTRIBUTIONS = {"mlflow": ["mlflow-skinny"], **packages_distributions()}  # it may be missing


def test_the_public_names_are_those_of_all() -> None:
    assert sorted(lora_exp.__all__) == ["compare", "compose", "load_adapter", "run"]
    assert {f"lora_exp.{name}" for name in lora_exp.__all__} <= set(PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'anything_else'"):
        lora_exp.anything_else  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists_and_has_a_docstring(name: str) -> None:
    module, _, last = name.rpartition(".")
    assert inspect.getdoc(getattr(importlib.import_module(module), last))


def test_every_public_name_is_in_the_reference() -> None:
    promised = {"lora_exp.data.Rows", "lora_exp.config.asset"}
    rewards = ("exact_match", "similarity", "regex", "format", "length")
    promised |= {f"lora_exp.rewards.{name}" for name in rewards}
    tree = inspect.getmembers(errors, inspect.isclass)
    promised |= {
        f"lora_exp.errors.{name}"
        for name, error_class in tree
        if error_class.__module__ == errors.__name__
    }
    assert promised <= set(PUBLIC)


def test_types_come_with_the_package() -> None:
    assert (ROOT / "lora_exp/py.typed").is_file()
    assert "lora_exp" in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def imported(path: Path) -> Iterator[str]:
    """Yield the names of the packages of others that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        tops = {name.partition(".")[0] for name in names}
        yield from tops - OURS - sys.stdlib_module_names


def declared(*extras: str) -> set[str]:
    """Return the distributions that pyproject names, always and for extras."""
    project = PROJECT["project"]
    texts = [*project["dependencies"]]
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(text).name) for text in texts}


@pytest.mark.parametrize(
    "path", [*PACKAGE, *TESTS_AND_SCRIPTS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_what_is_imported_is_declared(path: Path) -> None:
    extra = NEEDED_EXTRA.get(str(path.relative_to(ROOT)))
    extras = (
        [
            "docs",
            "eval",
            "search",
            "serve",
            "dev",
            "cluster",
            "ray",
            "tensorboard",
            "mlflow",
            "trackio",
        ]
        if path in TESTS_AND_SCRIPTS
        else [extra]
        if extra
        else []
    )
    known = declared(*extras)
    for package in set(imported(path)):
        distributions = {canonicalize_name(name) for name in DISTRIBUTIONS.get(package, [package])}
        assert distributions & known, f"{package}: pyproject.toml declares none of {distributions}"


def test_every_declared_package_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = PROJECT["project"]
    texts = [
        *project["dependencies"],
        *(t for e in project["optional-dependencies"].values() for t in e),
    ]
    for needed in map(Requirement, texts):
        if needed.name != project["name"]:
            assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), needed
