"""Conditions on values by key, as `--where` takes them: `peft.r>=16 and status=finished`.

    condition   = conjunction ("or" conjunction)*
    conjunction = term ("and" term)*
    term        = "(" condition ")" | key operator value
    operator    = "=" | "!=" | "<" | "<=" | ">" | ">=" | "~"

`~`: the text of the value contains the word. Nothing is evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_exp.errors import ConfigError

OPTION = "--where"
TOKEN = re.compile(r"""\s*(?:(<=|>=|!=|==|[=<>~()])|'([^']*)'|"([^"]*)"|([^\s()<>=!~'"]+))""")
SYMBOLS = ("<=", ">=", "!=", "==", "=", "<", ">", "~", "(", ")")
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
OPERATORS = ("=", "==", "!=", "~", *ORDERS)
Values = Callable[[str], Any]  # the value by a key; None: there is none


@dataclass
class Condition:
    """A condition that was read from text."""

    holds: Callable[[Values], bool]
    keys: list[str] = field(default_factory=list)


def read_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        ConfigError: it is not written by the grammar above.
    """
    reader = _Reader(text)
    holds = reader.condition()
    if reader.tokens:
        raise reader.fault(f"{reader.tokens[0][1]!r} is too much; join comparisons by and, or")
    return Condition(holds, reader.keys)


class _Reader:
    """Reads the grammar, a method for each of its rules."""

    def __init__(self, text: str) -> None:
        self.text, self.keys = text, list[str]()
        self.tokens = self._tokens()  # (whether it is a symbol, its text), those not read yet

    def condition(self) -> Callable[[Values], bool]:
        """Read `or`."""
        terms = [self.conjunction()]
        while self._takes("or"):
            terms.append(self.conjunction())
        return lambda values: any(term(values) for term in terms)

    def conjunction(self) -> Callable[[Values], bool]:
        """Read `and`."""
        terms = [self.term()]
        while self._takes("and"):
            terms.append(self.term())
        return lambda values: all(term(values) for term in terms)

    def term(self) -> Callable[[Values], bool]:
        """Read a comparison, or a condition in parentheses."""
        if self._takes("(", symbol=True):
            inner = self.condition()
            if not self._takes(")", symbol=True):
                raise self.fault("a ) is missing")
            return inner
        key = self._next("a key", symbol=False)
        sign = self._next(f"one of {' '.join(OPERATORS)} after {key!r}", symbol=True)
        if sign not in OPERATORS:
            raise self.fault(f"{sign!r} after {key!r} is none of {' '.join(OPERATORS)}")
        word = self._next(f"a value after {key}{sign}", symbol=False)
        self.keys.append(key)
        return lambda values: compare(key, values(key), sign, word)

    def fault(self, text: str) -> ConfigError:
        """Return the error of a text that is not written by the grammar."""
        example = "write it like 'peft.r>=16 and status=finished'"
        return ConfigError([(OPTION, f"{self.text!r}: {text}; {example}")])

    def _next(self, what: str, symbol: bool) -> str:
        if not self.tokens or self.tokens[0][0] != symbol:
            there = f", and there is {self.tokens[0][1]!r}" if self.tokens else ""
            raise self.fault(f"{what} is missing{there}")
        return self.tokens.pop(0)[1]

    def _takes(self, word: str, symbol: bool = False) -> bool:
        if not self.tokens or self.tokens[0] != (symbol, word):
            return False
        self.tokens.pop(0)
        return True

    def _tokens(self) -> list[tuple[bool, str]]:
        tokens, place, text = [], 0, self.text.rstrip()
        while place < len(text):
            match = TOKEN.match(text, place)
            if match is None:
                raise self.fault(f"{text[place:].strip()!r} cannot be read")
            symbol, *words = match.groups()
            word = next((word for word in words if word is not None), "")
            tokens.append((symbol is not None, symbol or word))
            place = match.end()
        return tokens


def compare(key: str, value: Any, sign: str, word: str) -> bool:
    """Return whether a value compares with a word as the sign says.

    A number is compared with a number, all else as text; without a value only `!=` holds.

    Raises:
        ConfigError: a number is to be compared in order with a text.
    """
    if sign == "~":
        return value is not None and word.casefold() in str(value).casefold()
    are_numbers = isinstance(value, int | float) and not isinstance(value, bool)
    number = _number(word)
    if sign in ORDERS:
        if value is None:
            return False
        if are_numbers and number is None:
            raise ConfigError([(OPTION, f"{key}{sign}{word}: {key} is a number, {word!r} is none")])
        return ORDERS[sign](value, number) if are_numbers else ORDERS[sign](str(value), word)
    is_equal = value == number if are_numbers and number is not None else _text(value) == word
    return is_equal != (sign == "!=")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _text(value: Any) -> str:
    """Return a value as a config writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
