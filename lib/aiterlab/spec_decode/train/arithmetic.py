# SPDX-License-Identifier: Apache-2.0
"""Generate arithmetic exercises in one fixed form, so that an exact-match score means something and nothing leaks.

Which exercises are held out is a property of the exercise itself (a hash), so training and test cannot overlap whatever
the seeds are.
"""

import hashlib
import random

HELD_OUT_ONE_IN = 20
_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def is_held_out(a: int, sign: str, b: int) -> bool:
    """Say whether an exercise belongs to the test set; commuted sums and products go together."""
    if sign in "+*":
        a, b = min(a, b), max(a, b)
    digest = hashlib.sha256(f"{a} {sign} {b}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def question(a: int, sign: str, b: int) -> str:
    """Return the exercise up to where the answer begins (its leading space is part of the answer)."""
    return f"Question: {a} {sign} {b} = ?\nAnswer:"


def answer(a: int, sign: str, b: int) -> str:
    """Return the exact answer."""
    return str(_OPERATIONS[sign](a, b))


def solved(a: int, sign: str, b: int) -> str:
    """Return one solved exercise, one blank line after it."""
    return f"{question(a, sign, b)} {answer(a, sign, b)}\n\n"


def draw(rng: random.Random) -> tuple[int, str, int]:
    """Draw one exercise: sums and differences of one to three digits, products of one by up to two digits."""
    sign = rng.choices("+-*", (5, 4, 1))[0]
    if sign == "*":
        return rng.randrange(10), sign, rng.randrange(100)
    a, b = (rng.randrange(10 ** rng.choices((1, 2, 3), (1, 3, 5))[0]) for _ in range(2))
    return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)


def draw_from(rng: random.Random, held_out: bool) -> tuple[int, str, int]:
    """Draw until the exercise is on the wanted side of the split."""
    while is_held_out(*(exercise := draw(rng))) != held_out:
        pass
    return exercise


def training_documents(size_bytes: int, seed: int) -> list[str]:
    """Return documents of 1 to 24 solved training exercises, about `size_bytes` in all."""
    rng = random.Random(seed)
    documents, written = [], 0
    while written < size_bytes:
        text = "".join(solved(*draw_from(rng, held_out=False)) for _ in range(rng.randint(1, 24)))
        documents.append(text)
        written += len(text)
    return documents


def test_records(count: int, shots: int, seed: int) -> list[dict]:
    """Return `count` zero-shot and `count` few-shot prompts over the same held-out exercises."""
    rng = random.Random(seed)
    chosen = {}
    while len(chosen) < count:
        exercise = draw_from(rng, held_out=True)
        chosen[exercise] = None
    records = []
    for setting, number in (("zero-shot", 0), ("few-shot", shots)):
        for index, exercise in enumerate(chosen):
            examples = "".join(solved(*draw_from(rng, held_out=False)) for _ in range(number))
            records.append(
                {
                    "id": f"arithmetic-{setting}-{index:03d}",
                    "task": "arithmetic",
                    "setting": setting,
                    "shots": number,
                    "text": examples + question(*exercise),
                    "reference": " " + answer(*exercise),
                    "answer": answer(*exercise),
                    "source": "generated",
                    "licence": "Apache-2.0",
                }
            )
    return records
