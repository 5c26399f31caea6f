"""A run's config: composed from groups, settled into plain values, and the one door to `_target_`.

Knows nothing of torch; only this module knows `instantiate`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config.resume import continued
from lora_exp.config.signature import functions, signature
from lora_exp.config.start import started
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.files.redaction import redact_text

PACKAGE = Path(__file__).parent.parent
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
GROUPS = ("model", "quant", "peft", "targets", "algorithm", "data", "tracking")  # one option each
# what a run is called, where it reports and what it may import does not change what it computes
NOT_COMPUTED = (
    "name", "choices", "tracking", "resume", "retry_failed", "strict", "trusted_targets",
    "lockstep",
)  # fmt: skip
UNNAMED = re.compile(
    r"(name|resume|retry_failed|strict|trusted_targets|tracking|hydra|samples|objective|goal"
    r"|lockstep|model\.gguf_file)\b"
    r"|train\.(eval|save|logging)_"
)


def product(*factors: float) -> float:
    """Multiply rates; rounded so that 2e-5 * 10 reads 0.0002 in every file."""
    return float(f"{math.prod(float(factor) for factor in factors):.12g}")


def run_dir(resume: str | None) -> str:
    """Return the directory of a run: a new one, or the one it continues.

    Raises:
        ConfigError: there is no run to continue.
    """
    if resume and not (Path(resume) / "config.yaml").is_file():
        near = did_you_mean(Path(resume).name, (p.name for p in Path(resume).parent.glob("*")))
        raise ConfigError([("resume", f"no run in {resume}: it has no config.yaml{near}")])
    return resume or f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}"


OmegaConf.register_new_resolver("product", product, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, use_cache=True, replace=True)
OmegaConf.register_new_resolver(
    "hydra_subdir", lambda resume: ".hydra/resumed" if resume else ".hydra", replace=True
)


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Compose, settle and validate a run's config, as the command line would.

    Args:
        overrides: what would follow `python run.py`, such as `"peft.r=8"`.
        config_dir: a folder with options of your own.

    Raises:
        ConfigError: an override that names no option or key, or every fault of the config.
    """
    import hydra

    from lora_exp.config.mistakes import mistake
    from lora_exp.config.validation import validate

    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError([("--config-dir", f"{config_dir} is no folder")])
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            own = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
            full = hydra.compose("config", [*own, *overrides], return_hydra_config=True)
    except Exception as error:
        if (ours := mistake(error)) is None:
            raise
        raise ours from error
    choices = OmegaConf.to_container(full.hydra.runtime.choices)
    with open_dict(full):
        del full["hydra"]
    return validate(settle(full, dict(choices), overrides))  # type: ignore[arg-type]


def settle(cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Resolve a composed config into plain read-only values, with its choices and its name.

    Raises:
        ConfigError: a required value is missing, or an interpolation finds nothing.
    """
    overrides = list(overrides)
    if cfg.trusted_targets and not any(o.startswith("trusted_targets=") for o in overrides):
        raise ConfigError(
            [("trusted_targets", "only the command line may trust a target, not a file")]
        )
    if cfg.resume:
        return _freeze(_resumed(cfg, choices, overrides))
    if apart := [group for group in GROUPS if group not in choices]:
        text = "give one option, like {0}=NAME; several of them are a sweep: -m {0}=A,B"
        raise ConfigError((group, text.format(group)) for group in apart)
    try:
        missing = OmegaConf.missing_keys(cfg)
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError([(str(error.full_key), str(error).splitlines()[0])]) from error
    if missing:
        raise ConfigError((key, f"is required; give {key}=...") for key in sorted(missing))
    _check_consent(values, overrides)
    values = started(values, overrides)
    values["choices"] = {k: v for k, v in choices.items() if "/" not in k and v is not None}
    values["name"] = values["name"] or _name(values, overrides)
    return _freeze(values)


def _check_consent(values: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Let only the command line, never a file, allow code that came with a model."""
    model = values.get("model") or {}
    if model.get("trust_remote_code") and "model.trust_remote_code=true" not in overrides:
        text = "runs code that came with the model; only the command line may say so"
        raise ConfigError([("model.trust_remote_code", text)])


def _resumed(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]
) -> dict[str, Any]:
    """Take the config that a run was started with, and what it may be told anew."""
    saved = OmegaConf.load(Path(run_dir(cfg.resume)) / "config.yaml")
    values: dict[str, Any] = OmegaConf.to_container(saved)  # type: ignore[assignment]
    values = continued(values, cfg, choices, overrides)
    _check_consent(values, overrides)
    here = {key: cfg[key] for key in ("resume", "retry_failed", "strict")}
    return values | here | {"trusted_targets": list(cfg.trusted_targets)}


def _freeze(values: dict[str, Any]) -> DictConfig:
    settled = OmegaConf.create(values)
    OmegaConf.set_struct(settled, True)
    OmegaConf.set_readonly(settled, True)
    return settled


def _name(values: Mapping[str, Any], overrides: Iterable[str]) -> str:
    """Tell a run from its siblings: method, rank, quantisation, targets, then the overrides."""
    chosen, peft = values["choices"], values["peft"] or {}
    rank = f"r{peft['r']}" if peft.get("r") else ""
    targets = chosen["targets"] if peft.get("target_modules") == values["targets"] else ""
    method = {"lora": "", "none": "full"}.get(chosen["peft"], chosen["peft"])
    parts = [method, rank, chosen["quant"], targets]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in ("peft", "quant", "targets", "peft.r") or UNNAMED.match(key):
            continue
        if redact_text(override) != override:
            continue
        value = value.rstrip("/").rpartition("/")[2]  # of a path, the last part
        parts.append(value if key in chosen else f"{key.rpartition('.')[2]}={value}")
    name = "-".join(part for part in parts if part and part != "none")
    return re.sub(r"[^\w.=,+-]+", "_", name)[:100]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as nested dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def fingerprint(cfg: DictConfig) -> str:
    """Return the SHA-256 of what a config computes: equal configs give equal adapters."""
    values = {key: value for key, value in plain(cfg).items() if key not in NOT_COMPUTED}
    values["lockstep_mode"] = cfg.lockstep.mode
    if not values["train"].get("load_best_model_at_end"):
        told = re.compile(r"(logging|save|eval)_")  # reports shape nothing
        values["train"] = {k: v for k, v in values["train"].items() if not told.match(k)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def asset(path: str) -> Path:
    """Resolve `pkg://package/file`, as Hydra writes it, to the file that the package carries.

    Any other path comes back as it is.

    Raises:
        ConfigError: no such package is installed.
    """
    if not path.startswith("pkg://"):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix("pkg://").partition("/")
    if package == "lora_exp":
        return PACKAGE / rest
    from importlib.util import find_spec

    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError([(path, f"no package {package!r} is installed")])
    return Path(spec.submodule_search_locations[0]) / rest


@cache
def shipped_targets() -> frozenset[str]:
    """Return every `_target_` of our own conf/."""
    found = re.compile(r"_target_:\s*([\w.]+)")
    return frozenset(t for path in CONF.rglob("*.yaml") for t in found.findall(path.read_text()))


def is_trusted(target: str, trusted: Iterable[str] = ()) -> bool:
    """Say whether a `_target_` may be imported: shipped, defined in lora_exp, or named by the user.

    Names that lora_exp merely imports (`lora_exp.config.settled.json.loads`) are not its own.
    """
    if target in shipped_targets() or target in set(trusted):
        return True
    found = signature(target) if target.startswith("lora_exp.") else None
    return found is not None and found.module.split(".")[0] == "lora_exp"


def every_target(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of every `_target_` in a config, however deep."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, child in children:
        if name == "_target_":
            yield key, child
        elif isinstance(child, Mapping | list | tuple):
            yield from every_target(child, f"{key}.{name}" if key else str(name))


def untrusted(cfg: DictConfig) -> list[tuple[str, str]]:
    """Return a fault for each `_target_` that may not be imported."""
    named = [(f"{key}._target_", target) for key, target in every_target(plain(cfg))]
    listed = OmegaConf.select(cfg, "algorithm.rewards", throw_on_missing=False) or ()
    if isinstance(listed, str):
        return [("algorithm.rewards", f"is a list; algorithm.rewards=[{listed}]")]
    rewards = [(f"algorithm.rewards.{i}", r) for i, r in enumerate(listed) if isinstance(r, str)]
    named += [(key, name) for key, name in rewards if not is_path(name)]
    return [
        (key, _distrust(target) + (_near_reward(target) if "rewards" in key else ""))
        for key, target in named
        if not (isinstance(target, str) and is_trusted(target, cfg.trusted_targets))
    ]


def _distrust(target: Any) -> str:
    if str(target).startswith("lora_exp."):
        return f"{target!r} is not trusted: nothing of that name is lora_exp's own"
    return f"{target!r} is not trusted; to run it, add trusted_targets=[{target}]"


def _near_reward(name: Any) -> str:
    if "." in str(name) and not str(name).startswith("lora_exp."):
        return ""
    own = functions("lora_exp.rewards")
    return did_you_mean(f"lora_exp.rewards.{str(name).rpartition('.')[2]}", own, 1)


def is_path(name: str) -> bool:
    """Tell a folder from a dotted name."""
    return "/" in name or name.startswith(("~", "."))


def build(
    cfg: DictConfig, key: str, through: Callable[[Any], Any] | None = None, **runtime: Any
) -> Any:
    """Call the `_target_` at a key with the YAML's values and Python's objects.

    Two steps, since `instantiate` would copy keyword objects into an OmegaConf tree.

    Args:
        cfg: the run's.
        key: of the node.
        through: makes of the target what is called in its place.
        runtime: the objects.

    Returns:
        What the target returns, or None where the key holds null (`quant=none`).

    Raises:
        ConfigError: the target may not be imported.
    """
    from hydra.utils import instantiate

    node = OmegaConf.select(cfg, key)
    if node is None:
        return None
    faults = [fault for fault in untrusted(cfg) if fault[0].startswith(key)]
    if faults:
        raise ConfigError(faults)
    made = instantiate(node, _partial_=True, _convert_="all")
    call = partial(through(made.func), *made.args, **made.keywords) if through else made
    return call(**runtime)
