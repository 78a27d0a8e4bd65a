"""An evaluation as Markdown: tables with intervals, and what the figures mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refrag_platform.evaluation.metrics import PREFIXES, gap_recovered
from refrag_platform.evaluation.systems import EXPLAINED, SYSTEMS, VECTOR_SYSTEMS
from refrag_platform.markdown import table

# Rows whose names don't tell.
CONTROLS = (
    "REFRAG's own decoder reads another document's vectors in refrag_shuffled, zeros in refrag_zero, no context in "
    "refrag_none."
)
OWN_DECODER = "read by REFRAG's own decoder; no control was trained"
ORDERS_SAID = {
    "nearest": "All systems read the passages in the same order: nearest to the question first, by the retriever.",
    "listed": "All systems read the passages in the same order: as the question's file lists them.",
    "shuffled": "All systems read the passages in the same order: at random.",
}


def figure(value: float | None, digits: int = 3) -> str:
    """A number as tables show it; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def evaluation_report(result: Mapping[str, Any]) -> str:
    """The report of a result of `refrag evaluate perplexity` or `rag`, and what it was of: a model card's part."""
    told = ("model", "documents", "questions", "questions_used", "retriever", "distractors", "device")
    facts = "; ".join(f"{name.replace('_', ' ')}: {result[name]}" for name in told if result.get(name))
    report = perplexity_report(result) if "gap_recovered" in result else rag_report(result)
    return f"{report.strip()}\n\nEvaluated: {facts}."


def perplexity_report(result: Mapping[str, Any]) -> str:
    """Log-perplexity, gap recovered and paired gains of `evaluate_perplexity`'s result."""
    intervals = result.get("intervals") or [{}] * len(result["rows"])
    rows = [
        [system_name(row), *(_with_interval(row[name], interval.get(name)) for name in PREFIXES), str(row["windows"])]
        for row, interval in zip(result["rows"], intervals, strict=True)
    ]
    resampled = not result.get("intervals") or any(interval.get(name) for interval in intervals for name in PREFIXES)
    parts = [
        "## Log-perplexity",
        f"Mean negative log-likelihood in nats of the first N tokens after the context; lower is better. {CONTROLS} "
        + (
            "In brackets: 95% intervals, documents resampled."
            if resampled
            else "Of one document there are no intervals, and refrag_shuffled has no other one's chunks to read."
        ),
        table(["system", *PREFIXES, "windows"], rows),
        _gap(result["gap_recovered"], result.get("gap_intervals") or {}) + _gap_of_text(result["rows"]),
    ]
    if result.get("differences"):
        gains = [
            [system_name({"system": row["over"], "tuned": row["tuned"]}), *(gain(row[name]) for name in PREFIXES)]
            for row in result["differences"]
        ]
        parts += [
            "Paired gain of refrag in nats, window by window; above zero, refrag is better:",
            table(["over", *PREFIXES], gains),
        ]
    return "\n\n".join(parts) + "\n"


def rag_report(result: Mapping[str, Any]) -> str:
    """Exact match, F1, decoder tokens, where measured time to first token and refusals, gains; of each set, too."""
    text = [
        "## Questions",
        "Greedy answers, SQuAD's normalization, best of several references. Decoder tokens: mean positions of "
        "the prompt. Compression: the full prompt's tokens over these, question and template counted. First token: "
        "median, chunk vectors made ahead.",
        *_read(result),
        *_rag_tables(result),
    ]
    if "seen" in result:
        text.append(seen_said(result["seen"]))
    if result.get("left_out"):
        text.append("Left out: " + "; ".join(f"{name}: {why}" for name, why in result["left_out"].items()) + ".")
    if result.get("references_skipped"):
        text.append(
            f"Skipped: {result['references_skipped']:,} references of which normalization leaves nothing, and "
            f"{result['questions_skipped']:,} questions that have no other."
        )
    parts = result.get("parts") or {}
    if parts:
        columns = [[figure(row["exact_match"]) for row in part["rows"]] for part in parts.values()]
        systems = [[system_name(row), str(row["passages"])] for row in result["rows"]]
        rows = [[*system, *cells] for system, *cells in zip(systems, *columns, strict=True)]
        text += ["Exact match of each part:", table(["system", "passages", *parts], rows)]
    for name, part in parts.items():
        text += [f"### Of these, {name}: {part['questions_used']:,} questions", *_rag_tables(part)]
    if retrieval := result.get("retrieval"):
        text += _retrieval(retrieval)
    return "\n\n".join(text) + "\n"


def seen_said(seen: Mapping[str, Any] | None) -> str:
    """One sentence or two on what `seen_in_training` found; None: of what the model was trained on nothing is known."""
    if seen is None:
        return (
            "Whether training has shown these questions isn't known here; `refrag questions overlap` compares them "
            "with files of training text."
        )
    text = (
        f"Seen in training: {seen['seen']:,} of {seen['questions']:,} questions, whose figures flatter. A passage that "
        f"holds the answer shares 12 words in a row with training text in {seen['run_of_words']:,}, half of its text "
        f"in {seen['half_a_passage']:,}; {seen['same_question']:,} were asked in the same words."
    )
    missing = f" Not compared, as they can't be read here: {', '.join(seen['missing'])}." if seen["missing"] else ""
    return text + missing


def _retrieval(result: Mapping[str, Any]) -> list[str]:
    """Hit rates of the chunk store's search, and the answers over what it finds."""
    least, lookups = result["least_similarity"], result["lookups"]
    hits = [name for name in next(iter(lookups), {}) if name.startswith("hit_")]
    rows = [
        [row["kind"], str(row["questions"]), *(figure(row[name]) for name in hits), figure(row["answered"])]
        for row in lookups
    ]
    refused = (
        "Nothing is refused" if least is None else f"Answered: the share that least_similarity {least:g} lets pass"
    )
    text = [
        "## Looked up in the chunk store",
        f"Held-out questions by the search of the service ({result['retriever']}). Hit rate at k: the share of "
        f"questions with a gold passage among the first k. {refused}.",
        table(["questions", "number", *(name.replace("hit_", "hit rate at ") for name in hits), "answered"], rows),
    ]
    if "seen" in result:
        text.append(seen_said(result["seen"]))
    if not result["rows"]:
        return [*text, "No question's gold passage is in the store, so that none was answered over what search finds."]
    said = f"Those in the store, answered over the first {result['passages']} passages, as many as the service sends:"
    return [*text, said, *_rag_tables(result)]


def lookup_table(result: Mapping[str, Any]) -> str:
    """Hit rates and what is answered, in percent, of `retrieval_report`'s result; a row a kind of question."""
    cuts = next((list(row["alone"]) for row in result["rows"] if row["alone"]), [])

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield from (row["kind"], str(row["questions"]))
        for rates in (row["alone"], row["together"]):
            yield "–" if rates is None else "/".join(f"{100 * rates[cut]:.0f}" for cut in cuts)
        for share in (row["answered"], row["answered_other_half"]):
            yield figure(None if share is None else 100 * share, 1)

    rates = f"alone, hit rate at {'/'.join(cuts)}"
    head = ["question", "asked", rates, "together, likewise", "answered", "other half"]
    return table(head, [list(cells(row)) for row in result["rows"]])


def _read(result: Mapping[str, Any]) -> list[str]:
    """What the systems of the rows read, and in which order; nothing of files that don't say who read them."""
    rows = result["rows"]
    if not all("decoder" in row for row in rows):
        return []
    order = next((row["order"] for row in rows if row["order"]), None)
    named = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
    return [
        *([ORDERS_SAID[order]] if order else []),
        "In brackets stands which decoder read a row's text: tuned, a control trained for just that; tuned for full, "
        "one trained for whole passages; own decoder, the model's, trained for REFRAG. It reads all that has vectors.",
        "\n".join(f"- {name}: {EXPLAINED[name]}" for name in named),
    ]


def beside_full(rows: Sequence[Mapping[str, Any]], questions: int = 0) -> str | None:
    """REFRAG's answers at the most passages in one line, beside full context's: exact match, tokens, time.

    None where either was not evaluated. Both are of one evaluation, on one machine. Where no control read the full
    text, the line says that REFRAG's own decoder did: one that was trained for whole passages may answer better.

    Args: questions: how many were asked; 0: unknown.
    """
    largest = {row["system"]: row for row in sorted(rows, key=lambda row: row["passages"])}
    refrag, full = largest.get("refrag"), largest.get("full")
    if refrag is None or full is None or refrag["passages"] != full["passages"]:
        return None

    def figures(row: Mapping[str, Any], unit: str) -> str:
        time = row.get("ttft_ms")
        first = "" if time is None else f", first token after {figure(time, 0)} ms"
        return f"exact match {row['exact_match']:.1%}, {figure(row['decoder_tokens'], 0)} {unit}{first}"

    reader = "" if full.get("decoder") == "tuned" else f" ({OWN_DECODER})"
    return (
        f"REFRAG: {figures(refrag, 'decoder positions')}. Full context{reader}: {figures(full, 'tokens')}. "
        f"({f'{questions:,} ' if questions else ''}held-out questions over {refrag['passages']} passages each)"
    )


def _rag_tables(result: Mapping[str, Any]) -> list[str]:
    rows = result["rows"]
    columns = [("exact match", "exact_match", 3), ("F1", "f1", 3), ("decoder tokens", "decoder_tokens", 0)]
    further = [
        ("compression", "compression", 1),
        ("ROUGE-L", "rouge_l", 3),
        ("set match", "set_match", 3),
        ("refusal accuracy", "refusal_accuracy", 3),
        ("first token, ms", "ttft_ms", 1),
    ]
    # Lists in another order are the only answers that a set matches and exact match doesn't.
    lists = any(row.get("set_match", row["exact_match"]) != row["exact_match"] for row in rows)
    for title, key, digits in further:
        if any(row.get(key) is not None for row in rows) and (lists or key != "set_match"):
            columns.append((title, key, digits))
    body = [
        [system_name(row), str(row["passages"]), *(figure(row.get(key), digits) for _, key, digits in columns)]
        for row in rows
    ]
    tables = [table(["system", "passages", *(title for title, _, _ in columns)], body)]
    if result.get("differences"):
        scores = {"exact_match": "exact match", "f1": "F1", "rouge_l": "ROUGE-L"}
        scores |= {"set_match": "set match"} if lists else {}
        gains = [
            [
                system_name({**row, "system": row["over"], "share_kept": None}),
                str(row["passages"]),
                f"{row['share_kept']:g}",
                *(gain(row[name]) for name in scores),
            ]
            for row in result["differences"]
        ]
        tables += [
            "Paired gain of refrag, question by question; above zero, refrag is better:",
            table(["over", "passages", "p", *scores.values()], gains),
        ]
    return tables


def system_name(row: Mapping[str, Any]) -> str:
    """`none (tuned)`, `refrag, p = 0.1`: a row's system as tables and legends show it.

    Rows without `decoder`, of log-perplexities and of older files, say only whether a control was tuned.
    """
    name, share, as_many = row["system"], row.get("share_kept"), row.get("tokens_of")
    if name.startswith("refrag"):
        return name + (f", p = {share:g}" if share else "")
    reader = row.get("decoder") or ("tuned" if row.get("tuned") else None)
    said = name if name in VECTOR_SYSTEMS or reader in {None, name} else f"{name} ({reader})"
    if as_many is None:
        return said
    # These take p itself from REFRAG, the others its number of tokens alone.
    return f"{said}, {'' if name in {*VECTOR_SYSTEMS, 'kept'} else 'tokens of '}p = {as_many:g}"


def _gap(recovered: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
    if all(value is None for value in recovered.values()):
        return "Gap recovered: not given, for want of tuned controls (untuned ones flatter several times)."

    def share(name: str, value: float) -> str:
        interval = intervals.get(name)
        return f"{name} {value:.0%}" + (f" [{interval[0]:.0%}, {interval[1]:.0%}]" if interval else "")

    shares = ", ".join(share(name, value) for name, value in recovered.items() if value is not None)
    return f"Gap recovered between tuned no context (0%) and tuned full context (100%): {shares}."


def _gap_of_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same share for the last tokens as text, as many as REFRAG's vectors; nothing without tuned controls."""
    tuned = {row["system"]: row for row in rows if row.get("tuned")}
    none, full, truncated = (tuned.get(name, {}) for name in ("none", "full", "truncated"))
    shares = [
        f"{name} {value:.0%}" for name, value in gap_recovered(none, full, truncated).items() if value is not None
    ]
    return f" The last tokens as text, as many as the vectors: {', '.join(shares)}." if shares else ""


def _with_interval(value: float | None, interval: Sequence[float] | None, digits: int = 3) -> str:
    text = figure(value, digits)
    return text if interval is None else f"{text} [{figure(interval[0], digits)}, {figure(interval[1], digits)}]"


def gain(difference: Sequence[float | None] | None, digits: int = 3) -> str:
    """[mean, low, high] as `0.035 [0.020, 0.049]`; the interval or all of it may be missing."""
    if difference is None:
        return figure(None)
    mean, low, high = difference
    return _with_interval(mean, None if low is None or high is None else [low, high], digits)
