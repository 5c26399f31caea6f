"""A row as text: the spans of its answers, and its prompt.

Knows no token ids; `tokens` maps the spans to tokens.
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

Marker = Callable[
    [Row], Row | None
]  # returns a turn with `MARK` in it; None if there is no place for it
Span = tuple[int, int]  # first character, and the one after the last
THOUGHTS = "</think>"  # templates of reasoning models may drop an answer's text before it


def rendered(row: Row, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return a row as text, and the character spans that count in a completion-only loss.

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
    """Render a chat and return the span of each assistant turn: what the model writes, and its end.

    A turn begins where the rendered prompt for it ends, and ends where the chat rendered up to it
    ends. Some templates render a part of a chat differently from the whole (reasoning models drop
    earlier thoughts, Mistral moves the system prompt to the last question). Then both are rendered
    with a mark within the turn, and the texts after the mark are compared.

    Returns:
        The text, and the spans by index of the turn.

    Raises:
        DataError: the template refuses the chat or does not show an assistant turn.
    """
    chat = _Chat(row, tokenizer)
    spans: dict[int, Span] = {}
    previous_stop = 0
    for i, turn in enumerate(chat.turns):
        if turn["role"] != "assistant":
            continue
        stop = chat.stop(i)
        start = max(previous_stop, chat.start(i, stop))
        chat.check(i, start, stop)
        if start < stop:
            spans[i] = (start, chat.with_end(i, start, stop))
            previous_stop = spans[i][1]
    return chat.whole, spans


class _Chat:
    """A chat and its renderings."""

    def __init__(self, row: Row, tokenizer: Any) -> None:
        self.turns: list[Row] = row["messages"]
        self.tokenizer, self.tools = tokenizer, row.get("tools")
        self.special = special_tokens(tokenizer)  # separate the parts of a chat
        self.rendering = self._render(self.turns)
        self.whole, last = self.rendering, self.turns[-1]
        if last["role"] == "assistant" and self._lacks_end(last, self.rendering):
            self.whole += self._end_token_of(last)

    def _render(self, turns: list[Row], answer: bool = False) -> str:
        return render_chat(turns, self.tokenizer, self.tools, answer)

    def start(self, i: int, stop: int) -> int:
        """Return where the model begins to write turn i, which ends at `stop`."""
        if i:
            prompt = self._render(self.turns[:i], answer=True)
            if self.whole.startswith(prompt):
                return len(prompt)
            for marker in MARKERS:
                part = self._text_after(self.turns[:i], i - 1, marker, answer=True)
                whole = self._text_after(self.turns, i - 1, marker)
                start = self._divergence(part, whole)
                if start is not None and start <= stop:
                    return start
        # there is no prompt, or the template does not show it: take the answer's own text
        before = self._render(_marked(self.turns, i, _before_text) or []).partition(MARK)[0]
        return min(common_prefix(before, self.whole), stop)

    def stop(self, i: int) -> int:
        """Return where turn i ends, including the token with which the template ends it."""
        if i == len(self.turns) - 1:
            return len(self.whole)
        until_answer = self._render(self.turns[: i + 1])
        if self.whole.startswith(until_answer):
            return len(until_answer)
        for marker in MARKERS:
            part = self._text_after(self.turns[: i + 1], i, marker)
            stop = self._divergence(part, self._text_after(self.turns, i, marker))
            if stop is not None:
                return stop
        raise DataError(self._hidden_message(i))

    def _text_after(
        self, turns: list[Row], i: int, marker: Marker, answer: bool = False
    ) -> str | None:
        """Return the text after a mark in turn i; None if the template does not show the mark."""
        marked = _marked(turns, i, marker)
        text = self._render(marked, answer) if marked else ""
        return text.partition(MARK)[2] if MARK in text else None

    def _divergence(self, part: str | None, whole: str | None) -> int | None:
        """Return where the whole text diverges from a part of the chat; None if that is unknown.

        Args:
            part: the text after a mark in a part of the chat.
            whole: the text after the same mark in the whole chat.
        """
        if part is None or whole is None:
            return None
        length = 0
        for a, b in zip(self._pieces(part), self._pieces(whole), strict=False):
            if a != b:
                # two special tokens, or a token and a text, share no prefix
                is_text = not (self.special.fullmatch(a) or self.special.fullmatch(b))
                length += _common_words(a, b) if is_text else 0
                break
            length += len(a)
        rest = whole[length:]
        return len(self.rendering) - len(rest) if self.rendering.endswith(rest) else None

    def check(self, i: int, start: int, stop: int) -> None:
        """Check that the template shows the turn's text and tool calls.

        Raises:
            DataError: it does not show them.
        """
        turn, shown = self.turns[i], self.whole[start:stop]
        if turn["content"].rpartition(THOUGHTS)[2].strip() not in shown:
            self._check_mark(i, _in_text)
        for number, call in enumerate(turn.get("tool_calls", ())):
            if call["function"]["name"] not in shown:
                self._check_mark(i, partial(_in_name, number=number))
        if turn["content"] and turn.get("tool_calls") and i + 1 < len(self.turns):
            rest = self._text_after(self.turns, i + 1, _in_text)
            if rest is not None and start < len(self.rendering) - len(rest) < stop:
                text = f"the chat template writes turn {i + 1} into assistant turn {i}"
                raise DataError(f"{text}, between its calls and its text; make it two turns")

    def _check_mark(self, i: int, marker: Marker) -> None:
        marked = _marked(self.turns, i, marker)
        if marked is None or MARK not in self._render(marked):
            raise DataError(self._hidden_message(i))

    def _hidden_message(self, i: int) -> str:
        text = self.turns[i]["content"] or str(self.turns[i].get("tool_calls", ""))
        return f"the chat template does not show assistant turn {i}: {text[:60]!r}"

    def with_end(self, i: int, start: int, stop: int) -> int:
        """Return where turn i ends; in GLM's templates the first token of the next turn ends it."""
        lacks_end = self._lacks_end(self.turns[i], self.whole[start:stop])
        return stop + len(self._special_at(self.whole, stop)) if lacks_end else stop

    def _lacks_end(self, turn: Row, text: str) -> bool:
        """Return whether a text ends with a turn's own text, without a token of the template."""
        pieces = [piece for piece in self._pieces(text) if piece.strip()]
        if pieces and self.special.fullmatch(pieces[-1]):
            return False
        answer = turn["content"].rpartition(THOUGHTS)[2].strip()
        return bool(turn.get("tool_calls")) or text.rstrip().endswith(answer)

    def _special_at(self, text: str, position: int) -> str:
        match = self.special.match(text, position)
        return match.group() if match and match.group() != self.tokenizer.bos_token else ""

    def _end_token_of(self, turn: Row) -> str:
        """Return the special token that the template writes directly after the last turn, or ""."""
        if not turn.get("tool_calls"):
            return turn_end(self.tokenizer) or ""
        try:
            longer = self._render([*self.turns, {"role": "tool", "content": "x"}])
        except DataError:
            return ""
        return self._special_at(longer, len(self.whole)) if longer.startswith(self.whole) else ""

    def _pieces(self, text: str) -> list[str]:
        """Cut a text into special tokens and the texts between them."""
        pieces, position = [], 0
        for match in self.special.finditer(text):
            pieces += [text[position : match.start()], match.group()]
            position = match.end()
        return [piece for piece in [*pieces, text[position:]] if piece]


def _common_words(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts, up to its last white space."""
    length = common_prefix(a, b)
    if length in (len(a), len(b)):
        return length
    return max((i + 1 for i in range(length) if a[i].isspace()), default=0)


def _marked(turns: list[Row], i: int, marker: Marker) -> list[Row] | None:
    """Return turns with a mark in one of them; None if there is no place for it."""
    turn = marker(turns[i])
    return None if turn is None else [*turns[:i], turn, *turns[i + 1 :]]


def _in_text(turn: Row) -> Row:
    """Put the mark in the middle of the text: templates may check its beginning and end."""
    text = turn["content"].rpartition(THOUGHTS)[2]
    return _with_mark(turn, len(text) - len(text) // 2)


def _before_text(turn: Row) -> Row:
    """Put the mark before the text."""
    return _with_mark(turn, len(turn["content"].rpartition(THOUGHTS)[2].lstrip()))


def _with_mark(turn: Row, characters_left: int) -> Row:
    """Put the mark so that a number of characters of the content follow it."""
    position = len(turn["content"]) - characters_left
    return turn | {"content": turn["content"][:position] + MARK + turn["content"][position:]}


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


MARKERS: tuple[Marker, ...] = (_in_text, _in_arguments)


@dataclass(frozen=True)
class Prompt:
    """A row's prompt as text, and the known answer as greedy decoding would write it."""

    text: str
    answer: str | None
    chat: bool  # the text has its special tokens already; the tokenizer must not add any


def prompt_of(row: Row, tokenizer: Any) -> Prompt | None:
    """Split a row into prompt and known answer; None if it has no prompt, or a bad answer (label).

    The answer of a chat is as the template renders it, so that it can be compared with the answers
    of a model that was trained with the template.

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
    answer = row.get("chosen", row.get("completion", row.get("answer")))
    answer = answer[-1]["content"] if isinstance(answer, list) else answer
    if isinstance(row["prompt"], str):
        return Prompt(row["prompt"], answer, chat=False)
    text = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
    return Prompt(text, _decoded(answer, tokenizer) if answer is not None else None, chat=True)


def _decoded(text: str, tokenizer: Any) -> str:
    """Return a text as it would be decoded from a model's tokens: without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded
