"""A row as text: where its answers stand in it, and what it asks.

Knows no token ids; `tokens` carries the spans to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_exp.data.formats import common_prefix
from lora_exp.data.template import MARK, render_chat, special_tokens, turn_end
from lora_exp.data.turns import Row
from lora_exp.errors import DataError

Mark = Callable[[Row], Row | None]  # puts a mark in a turn; None where it has no place
Span = tuple[int, int]  # first character, and the one after the last
THOUGHTS = "</think>"  # what precedes it in an answer, templates of reasoning models may drop


def rendered(row: Row, tokenizer: Any) -> tuple[str, list[Span]]:
    """Write a row as text, with the character spans that a completion-only loss counts.

    Raises:
        DataError: the chat template refuses the row, or does not show an assistant turn.
    """
    if "messages" not in row:
        end = tokenizer.eos_token or ""
        text = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
        text = text.rstrip() if end and text.rstrip().endswith(end) else text + end
        return text, [(len(row.get("prompt", "")), len(text))]
    text, spans = turn_spans(row, tokenizer)
    turns = row["messages"]
    return text, [span for i, span in spans.items() if turns[i].get("weight", 1)]


def turn_spans(row: Row, tokenizer: Any) -> tuple[str, dict[int, Span]]:
    """Render a chat and find each assistant turn in it: what the model writes, its end included.

    A turn begins where the text that asks for it ends, and ends where the chat that ends with it
    does. Templates that write a part of a chat otherwise than the whole (reasoning models drop
    earlier thoughts, Mistral moves the system prompt to the last question) are rendered again with
    a mark within the turn, and what follows the mark is compared.

    Returns:
        The text, and the spans by the turn's number.

    Raises:
        DataError: the template refuses the chat or does not show an assistant turn.
    """
    chat = _Chat(row, tokenizer)
    spans: dict[int, Span] = {}
    floor = 0
    for i, turn in enumerate(chat.turns):
        if turn["role"] != "assistant":
            continue
        stop = chat.stop(i)
        start = max(floor, chat.start(i, stop))
        chat.check(i, start, stop)
        if start < stop:
            spans[i] = (start, chat.with_end(i, start, stop))
            floor = spans[i][1]
    return chat.whole, spans


class _Chat:
    """A chat and its renderings."""

    def __init__(self, row: Row, tokenizer: Any) -> None:
        self.turns: list[Row] = row["messages"]
        self.tokenizer, self.tools = tokenizer, row.get("tools")
        self.special = special_tokens(tokenizer)  # what separates the parts of a chat
        self.rendering = self._render(self.turns)
        self.whole, last = self.rendering, self.turns[-1]
        if last["role"] == "assistant" and self._is_bare(last, self.rendering):
            self.whole += self._end_of(last)

    def _render(self, turns: list[Row], answer: bool = False) -> str:
        return render_chat(turns, self.tokenizer, self.tools, answer)

    def start(self, i: int, stop: int) -> int:
        """Return where the model begins to write turn i, which ends at `stop`."""
        if i:
            asked = self._render(self.turns[:i], answer=True)
            if self.whole.startswith(asked):
                return len(asked)
            for mark in MARKS:
                one = self._after(self.turns[:i], i - 1, mark, answer=True)
                both = self._after(self.turns, i - 1, mark)
                start = self._parting(one, both)
                if start is not None and start <= stop:
                    return start
        # nothing is asked, or what was asked is not shown: the answer's own text
        before = self._render(_marked(self.turns, i, _before_text) or []).partition(MARK)[0]
        return min(common_prefix(before, self.whole), stop)

    def stop(self, i: int) -> int:
        """Return where turn i ends, with what the template writes to end it."""
        if i == len(self.turns) - 1:
            return len(self.whole)
        answered = self._render(self.turns[: i + 1])
        if self.whole.startswith(answered):
            return len(answered)
        for mark in MARKS:
            one = self._after(self.turns[: i + 1], i, mark)
            stop = self._parting(one, self._after(self.turns, i, mark))
            if stop is not None:
                return stop
        raise DataError(self._hidden(i))

    def _after(self, turns: list[Row], i: int, mark: Mark, answer: bool = False) -> str | None:
        """Return what follows a mark in turn i; None where the template does not show it."""
        marked = _marked(turns, i, mark)
        text = self._render(marked, answer) if marked else ""
        return text.partition(MARK)[2] if MARK in text else None

    def _parting(self, one: str | None, both: str | None) -> int | None:
        """Return where, in the whole text, its end and another text part; None: nowhere.

        Args:
            one: what follows a mark in a part of the chat.
            both: what follows the same mark in the whole chat.
        """
        if one is None or both is None:
            return None
        length = 0
        for a, b in zip(self._pieces(one), self._pieces(both), strict=False):
            if a != b:
                # two special tokens, or a token and a text, have nothing in common
                plain = not (self.special.fullmatch(a) or self.special.fullmatch(b))
                length += _common_words(a, b) if plain else 0
                break
            length += len(a)
        rest = both[length:]
        return len(self.rendering) - len(rest) if self.rendering.endswith(rest) else None

    def check(self, i: int, start: int, stop: int) -> None:
        """Check that the template shows the turn's answer and calls.

        Raises:
            DataError: it does not.
        """
        turn, shown = self.turns[i], self.whole[start:stop]
        if turn["content"].rpartition(THOUGHTS)[2].strip() not in shown:
            self._check_mark(i, _in_text)
        for number, call in enumerate(turn.get("tool_calls", ())):
            if call["function"]["name"] not in shown:
                self._check_mark(i, partial(_in_name, number=number))
        if turn["content"] and turn.get("tool_calls") and i + 1 < len(self.turns):
            rest = self._after(self.turns, i + 1, _in_text)
            if rest is not None and start < len(self.rendering) - len(rest) < stop:
                text = f"the chat template writes turn {i + 1} into assistant turn {i}"
                raise DataError(f"{text}, between its calls and its text; make it two turns")

    def _check_mark(self, i: int, mark: Mark) -> None:
        marked = _marked(self.turns, i, mark)
        if marked is None or MARK not in self._render(marked):
            raise DataError(self._hidden(i))

    def _hidden(self, i: int) -> str:
        text = self.turns[i]["content"] or str(self.turns[i].get("tool_calls", ""))
        return f"the chat template does not show assistant turn {i}: {text[:60]!r}"

    def with_end(self, i: int, start: int, stop: int) -> int:
        """Return where turn i ends; in GLM's templates the next turn's first token ends it."""
        bare = self._is_bare(self.turns[i], self.whole[start:stop])
        return stop + len(self._special_at(self.whole, stop)) if bare else stop

    def _is_bare(self, turn: Row, text: str) -> bool:
        """Tell whether a text ends with what a turn says, and nothing of the template's."""
        pieces = [piece for piece in self._pieces(text) if piece.strip()]
        if pieces and self.special.fullmatch(pieces[-1]):
            return False
        answer = turn["content"].rpartition(THOUGHTS)[2].strip()
        return bool(turn.get("tool_calls")) or text.rstrip().endswith(answer)

    def _special_at(self, text: str, at: int) -> str:
        found = self.special.match(text, at)
        return found.group() if found and found.group() != self.tokenizer.bos_token else ""

    def _end_of(self, turn: Row) -> str:
        """Return the special token that would directly follow the last turn, if one would."""
        if not turn.get("tool_calls"):
            return turn_end(self.tokenizer) or ""
        try:
            longer = self._render([*self.turns, {"role": "tool", "content": "x"}])
        except DataError:
            return ""
        return self._special_at(longer, len(self.whole)) if longer.startswith(self.whole) else ""

    def _pieces(self, text: str) -> list[str]:
        """Cut a text into the special tokens and what is between them."""
        pieces, at = [], 0
        for found in self.special.finditer(text):
            pieces += [text[at : found.start()], found.group()]
            at = found.end()
        return [piece for piece in [*pieces, text[at:]] if piece]


def _common_words(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common, up to a white space."""
    length = common_prefix(a, b)
    if length in (len(a), len(b)):
        return length
    return max((i + 1 for i in range(length) if a[i].isspace()), default=0)


def _marked(turns: list[Row], i: int, mark: Mark) -> list[Row] | None:
    """Return turns with a mark in one of them; None where there is no place for it."""
    turn = mark(turns[i])
    return None if turn is None else [*turns[:i], turn, *turns[i + 1 :]]


def _in_text(turn: Row) -> Row:
    """Put the mark within the text: its beginning and its end may be what a template looks at."""
    text = turn["content"].rpartition(THOUGHTS)[2]
    return _with_mark(turn, len(text) - len(text) // 2)


def _before_text(turn: Row) -> Row:
    """Put the mark where the text begins."""
    return _with_mark(turn, len(turn["content"].rpartition(THOUGHTS)[2].lstrip()))


def _with_mark(turn: Row, left: int) -> Row:
    """Put the mark where so many characters of the content are left."""
    at = len(turn["content"]) - left
    return turn | {"content": turn["content"][:at] + MARK + turn["content"][at:]}


def _in_arguments(turn: Row) -> Row | None:
    """Put the mark in the arguments of the last call."""
    if not turn.get("tool_calls"):
        return None
    *calls, last = turn["tool_calls"]
    function = last["function"]
    arguments = dict(function["arguments"]) | {"mark": MARK}
    return turn | {"tool_calls": [*calls, last | {"function": function | {"arguments": arguments}}]}


def _in_name(turn: Row, number: int) -> Row:
    """Put the mark in the name of a call."""
    calls = list(turn["tool_calls"])
    function = calls[number]["function"]
    name = function["name"] + MARK
    calls[number] = calls[number] | {"function": function | {"name": name}}
    return turn | {"tool_calls": calls}


MARKS: tuple[Mark, ...] = (_in_text, _in_arguments)


@dataclass(frozen=True)
class Prompt:
    """What a row asks, as text, and the known answer as greedy decoding would write it."""

    text: str
    answer: str | None
    chat: bool  # the chat template wrote the special tokens, the tokenizer must not


def prompt_of(row: Row, tokenizer: Any) -> Prompt | None:
    """Split a row into prompt and known answer; None where nothing is asked, or answered badly.

    The answer of a chat is what the template makes of it, so that it compares with what a model
    trained on that template says.

    Raises:
        DataError: the chat template refuses the row.
    """
    if "messages" in row:
        last = len(row["messages"]) - 1
        if row["messages"][-1]["role"] != "assistant" or not last:
            return None
        whole, spans = turn_spans(row, tokenizer)
        start, stop = spans.get(last, (len(whole), len(whole)))
        return Prompt(whole[:start], _decoded(whole[start:stop], tokenizer), chat=True)
    if "prompt" not in row or ("completion" in row and row.get("label") is False):
        return None
    known = row.get("chosen", row.get("completion", row.get("answer")))
    known = known[-1]["content"] if isinstance(known, list) else known
    if isinstance(row["prompt"], str):
        return Prompt(row["prompt"], known, chat=False)
    text = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
    return Prompt(text, _decoded(known, tokenizer) if known is not None else None, chat=True)


def _decoded(text: str, tokenizer: Any) -> str:
    """Return a text as a model's answer would come back: without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded
