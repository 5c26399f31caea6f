"""A row as text: the spans of its answers, and its prompt.

Knows no token ids; `encoding` maps the spans to tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_exp.data.formats import common_prefix
from lora_exp.data.marks import MARKERS, THOUGHTS, Marker, before_text, in_name, in_text, marked
from lora_exp.data.template import MARK, render_chat, special_tokens, turn_end
from lora_exp.data.turns import Row
from lora_exp.errors import DataError

Span = tuple[int, int]  # first character, and the one after the last


def rendered(row: Row, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return a row as text, and the character spans that count in a completion-only loss.

    Raises:
        DataError: the chat template refuses the row, or does not show an assistant turn.
    """
    if "messages" not in row:
        text = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
        text = ended(text, tokenizer)
        return text, [(len(row.get("prompt", "")), len(text))]
    text, spans = turn_spans(row, tokenizer)
    turns = row["messages"]
    return text, [span for i, span in spans.items() if turns[i].get("weight", 1)]


def ended(text: str, tokenizer: Any) -> str:
    """Return a plain text with one EOS token at its end, which it may have already."""
    end = tokenizer.eos_token or ""
    return text.rstrip() if end and text.rstrip().endswith(end) else text + end


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
                same = self._divergence(part, whole)
                if part is not None and same is not None and same[1] <= stop:
                    return self._after_opening(i, prompt, part[same[0] :], same[1], stop)
        # there is no prompt, or the template does not show it: take the answer's own text
        before = self._render(marked(self.turns, i, before_text) or []).partition(MARK)[0]
        return min(common_prefix(before, self.whole), stop)

    def _after_opening(self, i: int, prompt: str, rest: str, start: int, stop: int) -> int:
        """Return where turn i begins, if its prompt and the whole diverge before it is opened.

        Some templates end a tool's result otherwise if nothing follows it (Hermes).

        Args:
            i: the index of the turn.
            prompt: as it is rendered.
            rest: what follows in the prompt where the whole diverges from it.
            start: where it diverges, in the whole.
            stop: where the turn ends.
        """
        until_opening = self._render(self.turns[:i])
        opening = prompt.removeprefix(until_opening) if prompt.startswith(until_opening) else ""
        if not opening or len(rest) < len(opening):
            return start
        position = self.whole.find(self._pieces(opening)[0], start, stop)
        if position < 0:
            return start
        return position + self._common_length(opening, self.whole[position:stop])

    def stop(self, i: int) -> int:
        """Return where turn i ends, including the token with which the template ends it."""
        if i == len(self.turns) - 1:
            return len(self.whole)
        until_answer = self._render(self.turns[: i + 1])
        if self.whole.startswith(until_answer):
            return len(until_answer)
        for marker in MARKERS:
            part = self._text_after(self.turns[: i + 1], i, marker)
            same = self._divergence(part, self._text_after(self.turns, i, marker))
            if same is not None:
                return same[1]
        raise DataError(self._hidden_message(i))

    def _text_after(
        self, turns: list[Row], i: int, marker: Marker, answer: bool = False
    ) -> str | None:
        """Return the text after a mark in turn i; None if the template does not show the mark."""
        with_mark = marked(turns, i, marker)
        text = self._render(with_mark, answer) if with_mark else ""
        return text.partition(MARK)[2] if MARK in text else None

    def _divergence(self, part: str | None, whole: str | None) -> tuple[int, int] | None:
        """Return where the whole text diverges from a part of the chat; None if that is unknown.

        Args:
            part: the text after a mark in a part of the chat.
            whole: the text after the same mark in the whole chat.

        Returns:
            How many characters both have in common, and where they end in the rendering.
        """
        if part is None or whole is None:
            return None
        length = self._common_length(part, whole)
        rest = whole[length:]
        return (length, len(self.rendering) - len(rest)) if self.rendering.endswith(rest) else None

    def _common_length(self, a: str, b: str) -> int:
        """Return the length of the common prefix of two texts, in tokens and whole words."""
        length = 0
        for x, y in zip(self._pieces(a), self._pieces(b), strict=False):
            if x != y:
                # two special tokens, or a token and a text, share no prefix
                is_text = not (self.special.fullmatch(x) or self.special.fullmatch(y))
                return length + (_common_words(x, y) if is_text else 0)
            length += len(x)
        return length

    def check(self, i: int, start: int, stop: int) -> None:
        """Check that the template shows the turn's text and tool calls.

        Raises:
            DataError: it does not show them.
        """
        turn, shown = self.turns[i], self.whole[start:stop]
        text, calls = turn["content"].rpartition(THOUGHTS)[2].strip(), turn.get("tool_calls", ())
        # one of them may show the words of another
        is_one = len(calls) + bool(text) == 1
        if text and not (is_one and text in shown):
            self._check_mark(i, in_text)
        for number, call in enumerate(calls):
            if not (is_one and call["function"]["name"] in shown):
                self._check_mark(i, partial(in_name, number=number))
        if turn["content"] and calls and i + 1 < len(self.turns):
            rest = self._text_after(self.turns, i + 1, in_text)
            if rest is not None and start < len(self.rendering) - len(rest) < stop:
                text = f"the chat template writes turn {i + 1} into assistant turn {i}"
                raise DataError(f"{text}, between its calls and its text; make it two turns")

    def _check_mark(self, i: int, marker: Marker) -> None:
        turns = marked(self.turns, i, marker)
        if turns is None or MARK not in self._render(turns):
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
