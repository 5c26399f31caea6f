"""Translates errors of Hydra into our own: the key, what is wrong, what would be right.

Messages contain no values: one of them may be a secret.
"""

from __future__ import annotations

import re
from traceback import walk_tb
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_exp.config.door import CONF
from lora_exp.config.signature import signature
from lora_exp.config.words import key_hint, option_hint
from lora_exp.errors import ConfigError, LoraExpError, did_you_mean


def translate_error(error: Exception) -> LoraExpError | None:
    """Return an error of Hydra or of a YAML file as one of ours; None: it is another error."""
    if isinstance(error, LoraExpError):
        return error
    text = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError([_no_such_option(error)])
    if isinstance(error, YAMLError):
        return ConfigError([("an option's file", " ".join(text.split()))])
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if "${" in value:  # the shell has taken the quotes that Hydra needs
            return ConfigError([(key, f"cannot be read; quote it twice: '{key}=\"${{...}}\"'")])
        return ConfigError([(key, 'cannot be read; give key=value, or key="a text"')])
    if text.startswith("Only one of --run"):
        return ConfigError([("--cfg", "shows one run; leave out -m, and give one value to a key")])
    in_options = _raised_in(error) == "hydra._internal.defaults_list"
    if text.startswith("Config group override must be") or in_options:
        return ConfigError([("overrides", "an option is a word, like quant=nf4 or quant=none")])
    if not isinstance(error, HydraException | OmegaConfBaseException):
        failed = re.search(r"^\s*full_key: (\S+)$", text, re.MULTILINE)  # inside omegaconf
        return ConfigError([(failed[1], "cannot take this value")]) if failed else None
    resolving = r"ConfigError raised while resolving interpolation: (\S+?): (.*)"
    if in_resolver := re.search(resolving, text):
        return ConfigError([(in_resolver[1], in_resolver[2])])
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return ConfigError([(unknown[1], _no_such_key(unknown[1]))])
    if not_deleted := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return ConfigError([(not_deleted[1], _nothing_to_delete(not_deleted[1]))])
    if ambiguous := re.search(r"Ambiguous value for argument '([^=]+)=", text):
        key = ambiguous[1]
        list_hint = f", {key}=[A,B] is a list" if "." in key else ""
        return ConfigError([(key, f"has several values; -m {key}=A,B sweeps over them{list_hint}")])
    duplicate = r"Multiple values for ([\w/@.]+)\.|An item is already at '([^']+)'"
    if existing := re.search(duplicate, text):
        key = existing[1] or existing[2]
        return ConfigError([(key, f"is there already; give {key}=... without the +")])
    merging = re.search(r"Error merging override \+*([^=\s]+)=", text)
    kind = re.search(r"could not be converted to (\w+)", str(error.__cause__))
    if merging and kind:
        return ConfigError([(merging[1], f"cannot take this value, but one of type {kind[1]}")])
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError([(str(error.full_key), text.splitlines()[0])])
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text += f"\n{error.__cause__}"
    return ConfigError([("overrides", "; ".join(line.strip() for line in text.splitlines()))])


def _raised_in(error: Exception) -> str:
    """Return the module whose line raised an error that is not Hydra's own; empty: it is."""
    frames = [] if isinstance(error, HydraException) else list(walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals["__name__"]) if frames else ""


def _no_such_option(error: MissingConfigException) -> tuple[str, str]:
    file = str(error.missing_cfg_file)
    group, slash, name = file.partition("/")
    if not slash:
        return "--config-name", "there is no such config; leave it out"
    options = error.options or sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if hint := option_hint(group, name, options):
        return group, f"there is no {name!r}; give {hint}"
    text = f"there is no {name!r}{did_you_mean(name, options)}; there are {', '.join(options)}"
    if group == "targets":
        text += "; a list of modules goes to the adapter: peft.target_modules=[q_proj,v_proj]"
    return group, text


def _no_such_key(key: str) -> str:
    """Compare a key, part by part, with the default config, and return what is wrong with it."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", return_hydra_config=key.startswith("hydra."))
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return "no such key"
        if part not in node:
            if hint := key_hint(key):
                return f"no such key; give {hint}"
            arguments = _arguments(cfg, key.rpartition(".")[0])
            if part in arguments:
                return f"is not in the config, but can be added: give +{key}=..."
            return f"no such key{did_you_mean(part, [*map(str, node), *arguments])}"
        node = OmegaConf.select(node, part)
    return f"exists with another option of {key.partition('.')[0]}"


def _nothing_to_delete(key: str) -> str:
    """Return why a key cannot be deleted: of a null key Hydra reports that it does not exist."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.select(hydra.compose("config"), key.rpartition(".")[0] or "_")
    if isinstance(node, DictConfig) and key.rpartition(".")[2] in node:
        return "is null already, so the run chooses the value; leave the override out"
    return "no such key, so there is nothing to delete"


def _arguments(cfg: DictConfig, section: str) -> list[str]:
    """Return the arguments of the class or function of a section."""
    node = OmegaConf.select(cfg, "algorithm.args" if section == "train" else section or "_")
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    target_signature = signature(str(target))
    return list(target_signature.arguments) if target_signature else []
