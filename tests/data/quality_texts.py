"""Texts that break each quality rule more or less, made by chance but always the same."""

import random

# fmt: off
NOUNS = ("river", "door", "light", "paper", "town", "story", "engine", "garden", "question", "week")
VERBS = ("keeps", "moves", "shows", "doesn't", "makes", "won't", "gives", "leaves", "it's", "holds")
OTHERS = (
    "the", "the", "of", "and", "to", "that", "well-known", "3,000", "e.g.", "U.S.", "John's",
    "with", "have", "slowly", "(small)", "[1]",
)
# fmt: on
ENDS = (".", "?", "!", "...", ",", "", "…", '."', ";")
PHRASES = ("lorem ipsum dolor", "use cookies here", "enable JavaScript now", "a { b }", "# # #")


def sentence(rng: random.Random, open_ended: float) -> str:
    length = rng.randint(3, 24)
    words = [rng.choice(rng.choice((NOUNS, VERBS, OTHERS, OTHERS))) for _ in range(length)]
    if rng.random() < 0.003:
        words.append(rng.choice(PHRASES))
    end = rng.choice(ENDS) if rng.random() < open_ended else "."
    return " ".join(words).capitalize() + end


def text(rng: random.Random) -> str:
    """A page of some kind: prose, list, menu, repetition, numbers, symbols."""
    open_ended = rng.random() ** 2
    lines = [
        " ".join(sentence(rng, open_ended) for _ in range(rng.randint(1, 4)))
        for _ in range(rng.randint(1, 40))
    ]
    kind = rng.randrange(10)
    share = rng.random()
    if kind == 0:
        lines = [("- " if rng.random() < 0.7 + share / 3 else "") + line for line in lines]
    elif kind == 1:
        lines += rng.choices(lines, k=int(share * len(lines)) + 1)
    elif kind == 2:
        lines = [rng.choice(NOUNS) if rng.random() < share else line for line in lines]
    elif kind == 3:
        lines = [f"{line} {rng.randint(1, 10**6)} {rng.random():.5f}" for line in lines]
    elif kind == 4:
        words = lines[0].split()
        lines[0] = " ".join(words + words[: rng.randint(2, 12)] * rng.randint(1, 9))
    elif kind == 5:
        lines = [line.rstrip(".") + ("..." if rng.random() < share else ".") for line in lines]
    elif kind == 6:
        marks = ["#", "...", "|", "=>", "%", "12"] * (1 + 2 * (share < 0.5))
        lines = [" ".join((line, *rng.choices(marks, k=int(16 * share)))) for line in lines]
    elif kind == 7:
        long = "x" * rng.choice((8, 12, 30, 1001))
        lines = [
            " ".join([long if rng.random() < share / 2 else word for word in line.split()])
            for line in lines
        ]
    elif kind == 8:
        lines = [line.replace("the ", "a ").replace("of ", "") for line in lines[:4]]
    return rng.choice(("\n", "\n\n")).join(lines)


def quality_texts() -> list[str]:
    rng = random.Random(5)
    return [*(text(rng) for _ in range(600)), "x", "One word.", "- \n- \n- ", "\n \n", ""]
