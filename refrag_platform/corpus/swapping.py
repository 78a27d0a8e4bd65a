"""Copies of questions whose answer is another one: what can't be known by heart has to be read.

A few thousand questions are learnt by heart within an epoch or two of fine-tuning, and a model that reads vectors then
guesses instead of reading.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

QuestionRow = Mapping[str, Any]
# Other answers that are looked at for one copy: a field may have few, all alike.
ANSWER_DRAWS = 8
# Stands in the id of every copy.
MARK = "/swapped-"


def swapped(questions: Sequence[QuestionRow], copies: int) -> Iterator[dict[str, Any]]:
    """For each question `copies` rows with the answers of another question of the same field, in the gold passage too.

    A question whose field has no other answer, or whose answer does not stand in its gold passage as whole words, is
    left out. Rows are as `QuestionMaker` makes them, fixed by their ids.
    """
    same_field: dict[str, list[QuestionRow]] = defaultdict(list)
    for question in questions:
        same_field[question["field"]].append(question)
    for copy in range(1, copies + 1):
        for question in questions:
            if row := _swapped(question, same_field[question["field"]], f"{question['id']}{MARK}{copy}"):
                yield row


def _swapped(question: QuestionRow, others: Sequence[QuestionRow], name: str) -> dict[str, Any] | None:
    chance = random.Random(name)
    right_answers = {answer.lower() for answer in question["answers"]}
    for _ in range(ANSWER_DRAWS):
        answers = chance.choice(others)["answers"]
        if right_answers.isdisjoint(answer.lower() for answer in answers):
            break
    else:
        return None
    gold = question["gold"][0]
    passages = [dict(passage) for passage in question["passages"]]
    # 6% doesn't stand in 4.6%, nor 1,200 in 1,200,000.
    stands = re.compile(rf"(?<![\w.,]){re.escape(question['answers'][0])}(?![.,]?\w)")
    passages[gold]["text"], replaced = stands.subn(lambda _: answers[0], passages[gold]["text"])
    if not replaced:
        return None
    return {**question, "id": name, "answers": list(answers), "passages": passages}
