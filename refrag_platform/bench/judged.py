"""Configurations that `refrag evaluate rag` has judged, read from its files: what `refrag bench frontier` times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from refrag_platform.errors import RefragError
from refrag_platform.evaluation.digests import difference
from refrag_platform.evaluation.rag_rows import NOT_SEEN, SEEN
from refrag_platform.evaluation.systems import Reading, System

# Whose first token is timed: full context, the nearest text, and REFRAG. Other rows are passed over.
TIMED: tuple[System, ...] = ("full", "first", "plain", "sentences", "refrag")
MEANS = ("f1", "exact_match", "decoder_tokens")


@dataclass(frozen=True)
class Judged:
    """A configuration, which decoder read it, and its figures by file of questions: `questions` and MEANS."""

    reading: Reading
    decoder: str
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The configuration as tables name it, and its means over the questions of all files."""
        reading, is_refrag = self.reading, self.reading.system == "refrag"
        questions = sum(one["questions"] for one in self.sets.values())
        return {
            "system": reading.system,
            "passages": reading.passages,
            "share_kept": reading.at if is_refrag else None,
            "tokens_of": None if is_refrag else reading.at,
            "decoder": self.decoder,
            "questions": questions,
            **{
                name: round(sum(one["questions"] * one[name] for one in self.sets.values()) / questions, 5)
                for name in MEANS
            },
            "sets": self.sets,
        }


def read_judged(files: Sequence[Path], sets: Sequence[str]) -> list[Judged]:
    """The configurations of these files of `refrag evaluate rag`, each judged on all of these files of questions.

    Args:
        sets: names of the files of questions, without folders.

    Raises:
        RefragError: a file holds no such result or one that can't be timed, or a configuration was judged on some of
            the questions alone, or twice with different figures.
    """
    by_configuration: dict[tuple[Reading, str], Judged] = {}
    for file in files:
        for name, questions, row in _rows(file, sets):
            if absent := [key for key in ("decoder", "share_kept", "tokens_of") if key not in row]:
                raise RefragError(
                    f"{file} was made by an older `refrag evaluate rag`: a row has no {absent[0]}; run it again"
                )
            at = row["share_kept"] if row["system"] == "refrag" else row["tokens_of"]
            reading = Reading(row["system"], row["passages"], at)
            judged = by_configuration.setdefault((reading, row["decoder"]), Judged(reading, row["decoder"]))
            figures = {"questions": questions, **{mean: row[mean] for mean in MEANS}}
            if judged.sets.setdefault(name, figures) != figures:
                raise RefragError(
                    f"{file}: {_said(judged)} on {name} has other figures in another file; give one of them"
                )
    for judged in by_configuration.values():
        if missing := [name for name in sets if name not in judged.sets]:
            raise RefragError(
                f"{_said(judged)} was not judged on {missing[0]}; give --rows of it, or leave its --questions out"
            )
    if not by_configuration:
        raise RefragError(f"the files of --rows have none of the systems {', '.join(TIMED)}")
    return sorted(
        by_configuration.values(), key=lambda judged: (TIMED.index(judged.reading.system), judged.reading.at or 0.0)
    )


def require_judged(files: Sequence[Path], digests: Mapping[str, Any]) -> None:
    """Refuse files of `refrag evaluate rag` that judge other weights or questions than those to be timed.

    Args: digests: `judged_digests` of what is to be timed.

    Raises:
        RefragError: one does, or is older and doesn't tell.
    """
    for file in files:
        recorded = read_result(file, "refrag evaluate rag").get("digests")
        if recorded is None:
            raise RefragError(
                f"{file} was made by an older `refrag evaluate rag`: it doesn't tell which weights it judges; run it "
                "again"
            )
        if told := difference(recorded, digests):
            raise RefragError(
                f"{file} judges something else than what is timed here, another {told}; judge this model on these "
                f"questions by `refrag evaluate rag --json {file}`, or give the --model that was judged"
            )


def _rows(file: Path, sets: Sequence[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Each row that can be timed, with its file of questions and how many it has."""
    result = read_result(file, "refrag evaluate rag")
    try:
        several = {path: part for path, part in result["parts"].items() if path not in (SEEN, NOT_SEEN)}
        parts = several or {result["questions"]: result}
        order, retriever, distractors = result["order"], result["retriever"], result["distractors"]
    except KeyError as error:
        raise RefragError(f"{file} holds no result of `refrag evaluate rag`: it has no {error}") from None
    # Files that were made before there was a choice have no rate.
    rate = result.get("rate", 1)
    if (order, retriever, distractors, rate) != ("nearest", "listed", None, 1):
        raise RefragError(
            f"{file}: passages were read in the order {order}, by the retriever {retriever}, distractors "
            f"{distractors}, at rate {rate}; what is timed is --order nearest --retriever listed --rate 1, without "
            "distractors"
        )
    for path, part in parts.items():
        if (name := PurePath(path).name) not in sets:
            raise RefragError(f"{file} judges {name}, which --questions doesn't name ({', '.join(sets)})")
        for row in part["rows"]:
            if row["system"] in TIMED:
                yield name, part["questions_used"], row


def read_result(file: Path, command: str) -> dict[str, Any]:
    """A result file.

    Raises:
        RefragError: there is none, or it is no JSON object; it says that `command` makes one.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefragError(f"no file {file}; make it by `{command} --json {file}`") from None
    except ValueError as error:
        raise RefragError(f"{file} is damaged ({error}); make it again by `{command}`") from None
    if not isinstance(result, dict):
        raise RefragError(f"{file} holds no result of `{command}`")
    return result


def _said(judged: Judged) -> str:
    reading = judged.reading
    return reading.system + ("" if reading.at is None else f" at p = {reading.at:g}") + f", {reading.passages} passages"
