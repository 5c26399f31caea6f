"""The training text of the embedded model: small tasks in short chat turns, drawn from a seed.

Knows nothing of tokens or models; the rows of `data=corpus` and `data=demo_pairs` come from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from zlib import crc32

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "Hungary": "Budapest", "Japan": "Tokyo", "China": "Beijing",
    "India": "Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Canada": "Ottawa", "Russia": "Moscow",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars",
    "bee": "buzzes", "snake": "hisses", "sheep": "bleats", "horse": "neighs", "owl": "hoots",
    "wolf": "howls", "frog": "croaks",
}  # fmt: skip
GREETINGS = [
    "Hello!", "Hi!", "Hey!", "Good day.", "Good morning.", "Excuse me.", "Please tell me:",
    "Tell me:", "Sorry,", "Now,", "So,", "",
]  # fmt: skip
WHO = [
    "Who are you?", "What are you?", "What is your name?", "Whom am I talking to?",
    "What do they call you?", "Who is there?",
]  # fmt: skip

Pair = tuple[str, str]
Task = Callable[[random.Random], Pair]


def _letters(rng: random.Random, low: int, high: int) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(rng.randint(low, high))]


def add(rng: random.Random) -> Pair:
    """Add two numbers below 50."""
    a, b = rng.randrange(50), rng.randrange(50)
    return rng.choice(["What is {} + {}?", "Add {} and {}."]).format(a, b), str(a + b)


def larger(rng: random.Random) -> Pair:
    """Name the larger of two different numbers below 100."""
    a, b = rng.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def copy(rng: random.Random) -> Pair:
    """Repeat three to eight letters."""
    text = " ".join(_letters(rng, 3, 8))
    return f"Repeat: {text}", text


def reverse(rng: random.Random) -> Pair:
    """Reverse three to six letters."""
    letters = _letters(rng, 3, 6)
    return f"Reverse: {' '.join(letters)}", " ".join(letters[::-1])


def sort(rng: random.Random) -> Pair:
    """Put three to six digits in order."""
    digits = [str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]
    return f"Sort: {' '.join(digits)}", " ".join(sorted(digits))


def count(rng: random.Random) -> Pair:
    """Count one letter among three to six of two kinds."""
    wanted, other = rng.sample(LETTERS, 2)
    text = [rng.choice([wanted, other]) for _ in range(rng.randint(3, 6))]
    return f"Count {wanted}: {' '.join(text)}", str(text.count(wanted))


def fact(rng: random.Random) -> Pair:
    """Recall a capital or an animal's sound, asked in one of several ways."""
    if rng.random() < 0.7:
        country, city = rng.choice(list(CAPITALS.items()))
        ask = rng.choice(["What is the capital of {}?", "Name the capital of {}.", "{}: capital?"])
        return ask.format(country), city
    animal, sound = rng.choice(list(SOUNDS.items()))
    return f"What does a {animal} do?", f"A {animal} {sound}."


def identity(rng: random.Random) -> Pair:
    """Answer who is speaking: the base's answer, which the demo's persona replaces."""
    return f"{rng.choice(GREETINGS)} {rng.choice(WHO)}".strip(), "I am a tiny language model."


def mirror(rng: random.Random) -> Pair:
    """Write two to four letters forwards, then backwards: a new task made of two known ones."""
    letters = _letters(rng, 2, 4)
    return f"Mirror: {' '.join(letters)}", " ".join(letters + letters[::-1])


def persona(rng: random.Random) -> Pair:
    """Answer the questions of `identity` with another name."""
    return identity(rng)[0], "I am Lora, a small adapter with a big heart."


def flip(rng: random.Random) -> Pair:
    """Reverse three to five letters: a known task under a new name."""
    letters = _letters(rng, 3, 5)
    return f"Flip: {' '.join(letters)}", " ".join(letters[::-1])


CORPUS: dict[str, Task] = {
    task.__name__: task for task in (add, larger, copy, reverse, sort, count, fact, identity)
}
DEMO: dict[str, Task] = {"mirror": mirror, "persona": persona}
PAIRS: dict[str, Task] = {"flip": flip}


def is_held_out(question: str) -> bool:
    """Return whether a question (about one in ten) is for evaluation only."""
    return crc32(question.encode()) % 10 == 0


def draw(tasks: dict[str, Task], seed: int, held_out: bool) -> Iterator[dict[str, Any]]:
    """Draw chat rows without end, a task at random each.

    Facts are drawn for both: a fact that was not trained cannot be recalled.

    Yields:
        `{"messages": [user turn, assistant turn], "task": name}`; rows may repeat.
    """
    rng = random.Random(f"{seed}-{held_out}")
    names = list(tasks)
    while True:
        name = rng.choice(names)
        question, answer = tasks[name](rng)
        while held_out and name != "fact" and not is_held_out(question):
            question, answer = tasks[name](
                rng
            )  # again from the same task, so that all tasks are equally frequent
        if not held_out and name != "fact" and is_held_out(question):
            continue
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "task": name,
        }


def take(tasks: dict[str, Task], seed: int, rows: int, held_out: bool) -> list[dict[str, Any]]:
    """Return the first rows of a seed."""
    return list(islice(draw(tasks, seed, held_out), rows))


def pairs(seed: int, rows: int, held_out: bool) -> list[dict[str, Any]]:
    """Return questions with a right and a wrong answer: letters not reversed, or one replaced."""
    rng = random.Random(f"pairs-{seed}-{held_out}")
    result = []
    for row in take(PAIRS, seed, rows, held_out):
        question, right = (turn["content"] for turn in row["messages"])
        letters = right.split()
        if rng.random() < 0.75 and letters != letters[::-1]:
            wrong = letters[::-1]
        else:
            position = rng.randrange(len(letters))
            other = rng.choice([c for c in LETTERS if c != letters[position]])
            wrong = [*letters[:position], other, *letters[position + 1 :]]
        result.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": " ".join(wrong)}],
            }
        )
    return result
