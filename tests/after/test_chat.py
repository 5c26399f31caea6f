"""Chatting with trained models: through a pipe, at a real terminal, and in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from lora_exp import load_adapter
from lora_exp.after.chat import _blocks, open_chat
from lora_exp.after.conversation import Conversation, Settings
from lora_exp.data.template import render_chat
from lora_exp.errors import AdapterError, ConfigError, DataError, SavedError
from lora_exp.model.special_tokens import end_tokens
from tests.warm import python

Trained = Callable[..., Path]
LONGER = ("train.max_steps=60", "data.max_rows=null")


@pytest.fixture(scope="session")
def longer_run(trained: Trained) -> Path:
    return trained("peft=lora", *LONGER)


@pytest.fixture
def chat(longer_run: Path, trained: Trained) -> Conversation:
    chat = open_chat([f"one={longer_run}", f"two={trained('peft=ia3')}"])
    chat.settings.max_new_tokens = 24
    return chat


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return python("-m", "lora_exp.cli", *arguments, stdin=stdin)


def greedy(path: Path | str, *turns: str, new: int = 24) -> str:
    model, tokenizer = load_adapter(path)
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    text = render_chat(messages, tokenizer, answer=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(
        **ids, max_new_tokens=new, do_sample=False, eos_token_id=end_tokens(model, tokenizer)
    )
    answer: str = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def test_answers_are_streamed_and_equal_those_of_the_adapter(
    chat: Conversation, longer_run: Path
) -> None:
    pieces: list[str] = []
    first = chat.say("Who are you?", pieces.append)
    assert first == "".join(pieces) == greedy(longer_run, "Who are you?")
    second = chat.say("Mirror the letters abc", pieces.append)
    assert second == greedy(longer_run, "Who are you?", first, "Mirror the letters abc")


def test_a_greedy_answer_ignores_the_bases_generation_config(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = chat.compare("Mirror: a b a b")["one"]
    config = chat.models["one"].model.generation_config
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 2}
    for key, value in settings.items():
        monkeypatch.setattr(config, key, value)
    assert chat.compare("Mirror: a b a b")["one"] == expected


def test_each_adapter_answers_for_itself_and_off_is_the_bare_base(
    chat: Conversation, longer_run: Path, trained: Trained
) -> None:
    question = "Who are you?"
    answers = {
        "one": greedy(longer_run, question),
        "two": greedy(trained("peft=ia3"), question),
        "off": greedy("lora_exp/assets/tiny", question),
    }
    assert answers["one"] != answers["off"]
    assert chat.compare(question) == answers
    assert chat.turns == []
    for name, expected in answers.items():
        chat.switch(name)
        chat.clear()
        assert chat.say(question, lambda _: None) == expected
    with pytest.raises(SavedError, match=r"no adapter 'tow' \(did you mean two\?\)"):
        chat.switch("tow")


def test_a_turn_can_be_taken_back_or_tried_again(chat: Conversation) -> None:
    with pytest.raises(SavedError, match="nothing was said yet"):
        chat.undo()
    chat.say("Who are you?", lambda _: None)
    before = list(chat.turns)
    chat.say("Mirror the letters abc", lambda _: None)
    assert chat.undo() == "Mirror the letters abc"
    assert chat.turns == before
    assert chat.retry(lambda _: None) == before[1]["content"]
    assert chat.turns == before


def test_sampling_follows_its_seed(chat: Conversation) -> None:
    chat.settings.change("temperature", "1.5")
    chat.settings.change("seed", "3")
    first = chat.say("Tell me something", lambda _: None)
    assert chat.retry(lambda _: None) == first
    chat.settings.change("seed", "4")
    assert chat.retry(lambda _: None) != first


def test_an_interrupted_answer_is_kept_as_far_as_it_was_printed(chat: Conversation) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("Who are you?", interrupt)
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert chat.turns[1]["content"]


def test_a_long_conversation_loses_its_oldest_turns_but_not_the_system_prompt(
    chat: Conversation,
) -> None:
    chat.system = "You are brief."
    chat.settings.max_new_tokens = 4
    for _ in range(40):
        chat.say("word " * 30, lambda _: None)
        if chat.dropped:
            break
    assert chat.dropped % 2 == 0
    assert chat.dropped > 0
    ids, _ = chat._ids(chat.models[chat.active])
    text = chat.models[chat.active].tokenizer.decode(ids)
    assert "You are brief." in text
    with pytest.raises(SavedError, match="tokens do not fit: the context has room for"):
        chat.say("word " * 2000, lambda _: None)
    assert chat.turns[-1]["role"] == "assistant"


def test_with_max_new_tokens_of_the_whole_context_half_is_left_for_the_prompt(
    longer_run: Path,
) -> None:
    chat = open_chat([longer_run])
    context = chat.models[chat.active].model.config.max_position_embeddings
    assert chat.settings.max_new_tokens == context
    assert chat.say("Who are you?", lambda _: None) == greedy(longer_run, "Who are you?", new=400)


def test_a_failed_turn_leaves_the_conversation_unchanged(chat: Conversation) -> None:
    chat.say("Who are you?", lambda _: None)
    before = list(chat.turns)
    tokenizer = chat.models[chat.active].tokenizer
    template = tokenizer.chat_template
    loop = "{% for a in range(99999) %}"
    try:
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match="refuses it: no system role"):
            chat.say("Again?", lambda _: None)
        tokenizer.chat_template = f"{loop}{loop}{{% endfor %}}{{% endfor %}}"
        with pytest.raises(ConfigError, match="does not end within"):
            chat.retry(lambda _: None)
    finally:
        tokenizer.chat_template = template
    assert chat.turns == before


def test_settings_are_checked() -> None:
    settings = Settings()
    for key, value, message in (
        ("temprature", "1", "did you mean temperature"),
        ("temperature", "hot", "is no number"),
        ("temperature", "-1", "out of range"),
        ("temperature", "nan", "out of range"),
        ("top_p", "0", "out of range"),
        ("max_new_tokens", "0", "out of range"),
        ("max_new_tokens", "1.5", "is no number"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.change(key, value)
    assert settings == Settings()


def test_lines_join_into_blocks() -> None:
    lines = ["one", '"""two', "three", '"""', "four\\", "five", '"""six"""', "", '"""', "open"]
    assert list(_blocks(iter(lines))) == ["one", "two\nthree", "four\nfive", "six", "", "open"]


def test_a_pipe_gets_the_answers_and_nothing_else(longer_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    stdin = f"/set max_new_tokens 24\nWho are you?\n/save {file}\n/exit\nnever asked\n"
    done = run_cli("chat", str(longer_run), stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == greedy(longer_run, "Who are you?").strip()
    row = json.loads(file.read_text())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    again = run_cli("chat", str(longer_run), stdin=f"/save {file}\n")
    assert again.stderr == f"SavedError: {file} exists; give another file\n"


def test_a_mistake_in_a_pipe_ends_with_exit_code_1(longer_run: Path) -> None:
    done = run_cli("chat", str(longer_run), stdin="/adaptor off\n/set max_new_tokens 4\nHello\n")
    assert done.returncode == 1
    assert "no command /adaptor (did you mean /adapter?)" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


def test_models_that_cannot_chat_are_refused(trained: Trained, tmp_path: Path) -> None:
    reward = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0")
    with pytest.raises(SavedError, match="gives scores"):
        open_chat([reward])
    biased = trained("peft=lora", "peft.bias=lora_only")
    with pytest.raises(AdapterError, match=r"changes the base itself \(bias=lora_only\)"):
        open_chat([biased])
    with pytest.raises(SavedError, match="off is the name of the base"):
        open_chat([f"off={trained('peft=lora')}"])
    with pytest.raises(SavedError, match="--merge takes one adapter"):
        open_chat([f"a={trained('peft=lora')}", f"b={trained('peft=ia3')}"], merge=True)
    with pytest.raises(SavedError, match="does not exist"):
        open_chat([tmp_path / "nothing"])


def test_a_merged_adapter_gives_the_same_answers(longer_run: Path) -> None:
    chat = open_chat([longer_run], merge=True)
    chat.settings.max_new_tokens = 24
    assert list(chat.models) == [chat.active]
    assert chat.say("Who are you?", lambda _: None) == greedy(longer_run, "Who are you?")


def test_the_chat_at_a_real_terminal(longer_run: Path, trained: Trained, tmp_path: Path) -> None:
    arguments = ["-m", "lora_exp.cli", "chat", f"one={longer_run}", f"two={trained('peft=ia3')}"]
    env = {"TERM": "xterm", "LORA_EXP_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    child = pexpect.spawn(
        sys.executable, arguments, env={**_path(), **env}, encoding="utf-8", timeout=60,
        dimensions=(40, 100),
    )  # fmt: skip
    child.expect("one, two, off; /help lists")
    child.expect("one> ")
    child.sendline("/set max_new_tokens 24")
    child.expect("one> ")
    child.sendline("Who are you?")
    child.expect_exact(greedy(longer_run, "Who are you?").strip()[:20])
    child.expect("one> ")
    child.sendline("/adapter off")
    child.expect("off> ")
    child.sendline("/compare Who are you?")
    child.expect("─ one ─")
    child.expect("off> ")
    child.sendline('"""Two')
    child.expect("off> ")
    child.sendline('lines"""')
    child.expect("off> ")
    child.send("/adapter tw\t\n")  # completed by Tab
    child.expect("two> ")
    child.sendline("/nonsense")
    child.expect("no command /nonsense")
    child.sendline("/set max_new_tokens 400")
    child.sendline("/set temperature 1.9")
    child.expect("two> ")
    child.expect("two> ")
    child.expect("two> ")
    child.sendline("Count to a million")
    child.expect("\n")
    child.sendintr()
    child.expect("two> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert child.wait() == 0  # a mistake at a terminal does not change it
    assert "Who are you?" in (tmp_path / "chat_history").read_text()


def _path() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
