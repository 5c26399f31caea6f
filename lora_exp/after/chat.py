"""The chat in a terminal or through a pipe: lines in, answers out, commands with a slash."""

from __future__ import annotations

import readline
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from lora_exp.after.conversation import OFF, Conversation
from lora_exp.after.loading import Loaded, in_floats, load, load_base, merged, side_by_side
from lora_exp.after.output import check_file
from lora_exp.after.saved import find_all
from lora_exp.errors import LoraExpError, SavedError, did_you_mean
from lora_exp.files.paths import cache_dir
from lora_exp.record.console import console, facts
from lora_exp.record.progress import quiet

HISTORY = 1000  # lines kept between chats
BLOCK = '"""'  # around a text of several lines
HELP = {
    "/adapter NAME": "let another adapter answer; off: the base alone; without NAME: list them",
    "/compare PROMPT": "the answers of the base and of every adapter, side by side",
    "/system TEXT": "set the system prompt; without TEXT: show it",
    "/set KEY VALUE": "temperature, top_p, max_new_tokens or seed; without KEY: show them",
    "/retry": "answer the last message again",
    "/undo": "remove the last message and its answer",
    "/clear": "start again",
    "/save FILE": "write the conversation as a row for training",
    "/help": "show this help",
    "/exit": "leave, as Ctrl-D does",
}
COMMANDS = tuple(usage.split()[0] for usage in HELP)


def open_chat(
    paths: Sequence[str | Path],
    base: str | None = None,
    quant: str | None = None,
    merge: bool = False,
    system: str | None = None,
) -> Conversation:
    """Load one model, or several adapters on one base, and start a conversation.

    Args:
        paths: adapters, runs or a whole model; `NAME=PATH` sets a name.
        base: the location of the base, if not the one that the adapter names.
        quant: how to quantise the base; None: as in the run of the first adapter.
        merge: merge the adapter into its base first; only with one adapter.
        system: the system prompt.

    Raises:
        SavedError: there is no model to chat with, or two have the same name.
        AdapterError: the adapters have different bases.
    """
    quiet()
    several = find_all(paths)
    classifiers = [saved for saved in several if saved.task_type == "SEQ_CLS"]
    if classifiers:
        text = "gives scores (algorithm=reward), it does not answer"
        raise SavedError(f"{classifiers[0].folder} {text}")
    if any(saved.name == OFF for saved in several):
        raise SavedError(f"{OFF} is the name of the base; give the adapter another name: NAME=PATH")
    if merge and (len(several) > 1 or several[0].adapter is None):
        raise SavedError("--merge takes one adapter; leave it out for several, or a whole model")
    first = several[0]
    loaded_base = load_base(first, base, quant)
    if first.adapter is None:
        models = {first.name: load(first, loaded_base)}
    elif merge:
        loaded = load(first, in_floats(loaded_base))
        models = {first.name: Loaded(first.name, merged(loaded.model).eval(), loaded.tokenizer)}
    else:
        models = {loaded.name: loaded for loaded in side_by_side(several, loaded_base, base)}
        models[OFF] = Loaded(OFF, loaded_base.model.eval(), models[first.name].tokenizer)
    return Conversation(models, first.name, system)


class Chat:
    """Reads lines, answers them, and runs commands."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.at_terminal = sys.stdin.isatty() and console.is_terminal
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        self.failed = False
        self.ended = False

    def run(self) -> bool:
        """Read lines until they end.

        Returns:
            Whether no line of a pipe failed; at a terminal always true, since errors are seen.
        """
        if self.at_terminal:
            names = ", ".join(self.conversation.models)
            text = f"{names}; /help lists the commands, {BLOCK} begins a block"
            console.print(Text(text, style="dim"))
        for text in self._terminal() if self.at_terminal else _blocks(iter(sys.stdin)):
            if not text.strip():
                continue
            try:
                self._handle(text)
            except LoraExpError as error:
                self.failed = True
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                console.print(Text("(stopped)", style="dim"))
            if self.ended:
                break
        return self.at_terminal or not self.failed

    def _terminal(self) -> Iterator[str]:
        history = cache_dir() / "chat_history"
        history.parent.mkdir(parents=True, exist_ok=True)
        if history.is_file():
            readline.read_history_file(history)
        readline.set_history_length(HISTORY)
        readline.set_completer_delims("")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        try:
            yield from _blocks(self._lines())
        finally:
            readline.write_history_file(history)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input(f"{self.conversation.active}> ")
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def _complete(self, text: str, state: int) -> str | None:
        adapters = [f"/adapter {name}" for name in self.conversation.models]
        matches = [word for word in (*COMMANDS, *adapters) if word.startswith(text)]
        return matches[state] if text and state < len(matches) else None

    def _handle(self, text: str) -> None:
        if not text.startswith("/"):
            self._answer(lambda: self.conversation.say(text, _write))
            return
        command, _, rest = text.partition(" ")
        if command not in COMMANDS:
            raise SavedError(f"no command {command}{did_you_mean(command, COMMANDS)}; /help")
        getattr(self, f"_{command[1:]}")(rest.strip())

    def _answer(self, generate: Callable[[], str]) -> None:
        dropped = self.conversation.dropped
        generate()
        print(flush=True)
        if self.conversation.dropped > dropped:
            count = self.conversation.dropped
            text = f"the first {count} turns no longer fit the model's context"
            print(f"({text}; /clear starts again)", file=sys.stderr)

    def _adapter(self, name: str) -> None:
        if name:
            self.conversation.switch(name)
            return
        for model in self.conversation.models:
            print(f"{'*' if model == self.conversation.active else ' '} {model}")

    def _compare(self, prompt: str) -> None:
        if not prompt:
            raise SavedError("/compare needs a prompt: /compare PROMPT")
        answers = self.conversation.compare(prompt)
        if not self.at_terminal:
            for name, answer in answers.items():
                print(f"[{name}]\n{answer}")
            return
        width = max(24, console.width // min(len(answers), 3) - 2)
        panels = [
            Panel(Text(answer), title=Text(name), width=width) for name, answer in answers.items()
        ]
        console.print(Columns(panels))

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = text
        else:
            print(self.conversation.system or "(no system prompt)")

    def _set(self, text: str) -> None:
        if not text:
            for key, value in vars(self.conversation.settings).items():
                print(f"{key} {value}")
            return
        key, _, value = text.partition(" ")
        self.conversation.settings.change(key, value.strip())

    def _retry(self, _: str) -> None:
        self._answer(lambda: self.conversation.retry(_write))

    def _undo(self, _: str) -> None:
        self.conversation.undo()

    def _clear(self, _: str) -> None:
        self.conversation.clear()

    def _save(self, path: str) -> None:
        if not path:
            raise SavedError("/save needs a file: /save FILE")
        file = Path(path).expanduser()
        if file.exists():
            raise SavedError(f"{file} exists; give another file")
        check_file(file, force=False)
        self.conversation.save(file)

    def _help(self, _: str) -> None:
        console.print(facts("commands", HELP))

    def _exit(self, _: str) -> None:
        self.ended = True


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    """Join the lines of a block, and those that end in a backslash."""
    block: list[str] = []
    inside = False
    for line in lines:
        line = line.rstrip("\n")
        if not inside and line.startswith(BLOCK):
            inside, line = True, line.removeprefix(BLOCK)
        ends = inside and line.endswith(BLOCK)
        block.append(line.removesuffix(BLOCK) if ends else line)
        if inside and not ends:
            continue
        if not inside and line.endswith("\\"):
            block[-1] = line[:-1]
            continue
        yield "\n".join(block).strip("\n")
        block, inside = [], False
    if block:
        yield "\n".join(block).strip("\n")


def _write(text: str) -> None:
    print(text, end="", flush=True)
