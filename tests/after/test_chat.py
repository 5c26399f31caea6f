"""Talking to what was trained: through a pipe, at a real terminal, and in Python."""

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

Trained = Callable[..., Path]
LONGER = ("train.max_steps=60", "data.max_rows=null")


@pytest.fixture(scope="session")
def taught(trained: Trained) -> Path:
    return trained("peft=lora", *LONGER)


@pytest.fixture
def talk(taught: Path, trained: Trained) -> Conversation:
    talk = open_chat([f"one={taught}", f"two={trained('peft=ia3')}"])
    talk.settings.max_new_tokens = 24
    return talk


def lora_exp(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_exp.cli", *arguments]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=120, check=False
    )


def greedy(path: Path | str, *turns: str, new: int = 24) -> str:
    model, tokenizer = load_adapter(path)
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    text = render_chat(messages, tokenizer, answer=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    made = model.generate(
        **ids, max_new_tokens=new, do_sample=False, eos_token_id=end_tokens(model, tokenizer)
    )
    said: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def test_answers_come_in_pieces_and_are_what_the_adapter_says(
    talk: Conversation, taught: Path
) -> None:
    pieces: list[str] = []
    first = talk.say("Who are you?", pieces.append)
    assert first == "".join(pieces) == greedy(taught, "Who are you?")
    second = talk.say("Mirror the letters abc", pieces.append)
    assert second == greedy(taught, "Who are you?", first, "Mirror the letters abc")


def test_each_adapter_answers_for_itself_and_off_is_the_bare_base(
    talk: Conversation, taught: Path, trained: Trained
) -> None:
    question = "Who are you?"
    answers = {
        "one": greedy(taught, question),
        "two": greedy(trained("peft=ia3"), question),
        "off": greedy("lora_exp/assets/tiny", question),
    }
    assert answers["one"] != answers["off"]
    assert talk.compare(question) == answers
    assert talk.turns == []
    for name, wanted in answers.items():
        talk.switch(name)
        talk.clear()
        assert talk.say(question, lambda _: None) == wanted
    with pytest.raises(SavedError, match=r"no adapter 'tow' \(did you mean two\?\)"):
        talk.switch("tow")


def test_a_turn_can_be_taken_back_or_tried_again(talk: Conversation) -> None:
    with pytest.raises(SavedError, match="nothing was said yet"):
        talk.undo()
    talk.say("Who are you?", lambda _: None)
    before = list(talk.turns)
    talk.say("Mirror the letters abc", lambda _: None)
    assert talk.undo() == "Mirror the letters abc"
    assert talk.turns == before
    assert talk.retry(lambda _: None) == before[1]["content"]
    assert talk.turns == before


def test_sampling_follows_its_seed(talk: Conversation) -> None:
    talk.settings.change("temperature", "1.5")
    talk.settings.change("seed", "3")
    first = talk.say("Tell me something", lambda _: None)
    assert talk.retry(lambda _: None) == first
    talk.settings.change("seed", "4")
    assert talk.retry(lambda _: None) != first


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(talk: Conversation) -> None:
    def impatient(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("Who are you?", impatient)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    assert talk.turns[1]["content"]


def test_a_long_conversation_loses_its_oldest_turns_but_not_the_system_prompt(
    talk: Conversation,
) -> None:
    talk.system = "You are brief."
    talk.settings.max_new_tokens = 4
    for _ in range(40):
        talk.say("word " * 30, lambda _: None)
        if talk.dropped:
            break
    assert talk.dropped % 2 == 0
    assert talk.dropped > 0
    ids, _ = talk._ids(talk.models[talk.active])
    text = talk.models[talk.active].tokenizer.decode(ids)
    assert "You are brief." in text
    with pytest.raises(SavedError, match="tokens do not fit: the context has room for"):
        talk.say("word " * 2000, lambda _: None)
    assert talk.turns[-1]["role"] == "assistant"


def test_answers_as_long_as_the_context_leave_half_of_it_to_the_prompt(taught: Path) -> None:
    talk = open_chat([taught])
    context = talk.models[talk.active].model.config.max_position_embeddings
    assert talk.settings.max_new_tokens == context
    assert talk.say("Who are you?", lambda _: None) == greedy(taught, "Who are you?", new=400)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(talk: Conversation) -> None:
    talk.say("Who are you?", lambda _: None)
    before = list(talk.turns)
    tokenizer = talk.models[talk.active].tokenizer
    kept = tokenizer.chat_template
    loop = "{% for a in range(99999) %}"
    try:
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match="refuses it: no system role"):
            talk.say("Again?", lambda _: None)
        tokenizer.chat_template = f"{loop}{loop}{{% endfor %}}{{% endfor %}}"
        with pytest.raises(ConfigError, match="does not end within"):
            talk.retry(lambda _: None)
    finally:
        tokenizer.chat_template = kept
    assert talk.turns == before


def test_settings_are_checked() -> None:
    settings = Settings()
    for key, value, wrong in (
        ("temprature", "1", "did you mean temperature"),
        ("temperature", "hot", "is no number"),
        ("temperature", "-1", "out of range"),
        ("temperature", "nan", "out of range"),
        ("top_p", "0", "out of range"),
        ("max_new_tokens", "0", "out of range"),
        ("max_new_tokens", "1.5", "is no number"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            settings.change(key, value)
    assert settings == Settings()


def test_lines_join_into_blocks() -> None:
    lines = ["one", '"""two', "three", '"""', "four\\", "five", '"""six"""', "", '"""', "open"]
    assert list(_blocks(iter(lines))) == ["one", "two\nthree", "four\nfive", "six", "", "open"]


def test_a_pipe_gets_the_answers_and_nothing_else(taught: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    said = f"/set max_new_tokens 24\nWho are you?\n/save {file}\n/exit\nnever asked\n"
    done = lora_exp("chat", str(taught), said=said)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == greedy(taught, "Who are you?").strip()
    row = json.loads(file.read_text())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    again = lora_exp("chat", str(taught), said=f"/save {file}\n")
    assert again.stderr == f"SavedError: {file} exists; name another file\n"


def test_a_pipe_that_holds_a_mistake_ends_with_exit_code_1(taught: Path) -> None:
    done = lora_exp("chat", str(taught), said="/adaptor off\n/set max_new_tokens 4\nHello\n")
    assert done.returncode == 1
    assert "no command /adaptor (did you mean /adapter?)" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


def test_a_chat_with_no_one_to_talk_to_is_refused(trained: Trained, tmp_path: Path) -> None:
    reward = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0")
    with pytest.raises(SavedError, match="gives scores"):
        open_chat([reward])
    biased = trained("peft=lora", "peft.bias=lora_only")
    with pytest.raises(AdapterError, match=r"changes the base itself \(bias=lora_only\)"):
        open_chat([biased])
    with pytest.raises(SavedError, match="off is the bare base here"):
        open_chat([f"off={trained('peft=lora')}"])
    with pytest.raises(SavedError, match="--merge takes one adapter"):
        open_chat([f"a={trained('peft=lora')}", f"b={trained('peft=ia3')}"], merge=True)
    with pytest.raises(SavedError, match="does not exist"):
        open_chat([tmp_path / "nothing"])


def test_a_merged_adapter_talks_as_before(taught: Path) -> None:
    talk = open_chat([taught], merge=True)
    talk.settings.max_new_tokens = 24
    assert list(talk.models) == [talk.active]
    assert talk.say("Who are you?", lambda _: None) == greedy(taught, "Who are you?")


def test_the_chat_at_a_real_terminal(taught: Path, trained: Trained, tmp_path: Path) -> None:
    arguments = ["-m", "lora_exp.cli", "chat", f"one={taught}", f"two={trained('peft=ia3')}"]
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
    child.expect_exact(greedy(taught, "Who are you?").strip()[:20])
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
    assert child.wait() == 0  # /nonsense was seen
    assert "Who are you?" in (tmp_path / "chat_history").read_text()


def _path() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
