"""Which keys of a space exist: one that only some options of a group have is absent elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf

from lora_exp.search.space import Space

Compose = Callable[[list[str]], DictConfig]


class Presence:
    """Answers by composing the config with a trial's options, once for each set of them."""

    def __init__(self, space: Space, compose: Compose) -> None:
        """Check that every key exists with at least one option of each group.

        Args:
            space: that of the search.
            compose: returns the config of a trial's overrides, common ones not among them.

        Raises:
            hydra.errors.ConfigCompositionException: a key exists with none of them.
        """
        self.space, self._compose = space, compose
        self._configs: dict[frozenset[tuple[str, str]], DictConfig] = {}
        keys = {d.key for d in space.dimensions}
        for key in keys - set(space.groups):
            if not any(self.exists(key, options) for options in self.one_varied()):
                options = [f"{k}={option}" for k, option in next(self.one_varied()).items()]
                compose([*options, f"{key}={space[key].at(0)}"])

    def present(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return the values whose keys exist with the options among them."""
        options = {key: values[key] for key in self.space.groups}
        return {key: text for key, text in values.items() if self.exists(key, options)}

    def exists(self, key: str, options: Mapping[str, str]) -> bool:
        """Return whether a key exists with the options of the groups."""
        if not options or key in options or key.startswith("+"):  # Hydra judges the last
            return True
        section, _, name = key.rpartition(".")
        config = self.config(options)
        node = OmegaConf.select(config, section) if section else config
        return isinstance(node, DictConfig) and name in list(node.keys())

    def config(self, options: Mapping[str, str]) -> DictConfig:
        """Return the config with these options of the groups, and the defaults of other keys."""
        cell = frozenset(options.items())
        if cell not in self._configs:
            self._configs[cell] = self._compose([f"{k}={option}" for k, option in options.items()])
        return self._configs[cell]

    def one_varied(self) -> Iterator[dict[str, str]]:
        """Yield the first option of each group, then each other option of one group."""
        first = {key: self.space[key].options[0] for key in self.space.groups}
        yield first
        for key in first:
            yield from (first | {key: option} for option in self.space[key].options[1:])
