"""Benchmarks as Markdown: rows of a result, and the tables of a document, which are never typed by hand.

A document names a result file between two comments; `refrag bench tables docs/performance.md` writes what stands
between them: <!-- bench performance/FILE.json --> ... <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from refrag_platform.errors import RefragError
from refrag_platform.evaluation.report import figure, system_name
from refrag_platform.files import write_text
from refrag_platform.markdown import table

# Of a time to first token from a question's arrival, in order. choice: by policy, or by sentences' nearness.
# projection: the prompt's tokens and embeddings, and the vectors among them projected.
PARTS = ("retrieval", "choice", "projection", "prefill")
# What a figure of times says where `unrecorded`.
UNRECORDED = "That the weights that were judged are those that were timed is not recorded by digests."
BLOCK = re.compile(r"(<!-- bench (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What a reader of `headline` must know.
QUALITY_AND_SPEED = """## Quality and speed

Greedy answers over passages that a retriever found. {reader}; prompt tokens count question and template. First
token: median from the question's arrival, retrieval included. One seed of training. Where the nearest text
answers better at as many tokens, send that instead."""


def system_label(row: Mapping[str, Any]) -> str:
    """The system of a row, with its k."""
    return f"refrag, k = {row['k']}" if row["k"] else str(row["system"])


def result_tables(result: Mapping[str, Any]) -> str:
    """Markdown of a benchmark's result: what it was measured on, and its tables."""
    if result["benchmark"] == "frontier":
        return frontier_report(result)
    if result["benchmark"] == "search":
        return search_report(result)
    if result["benchmark"] == "service":
        return service_report(result)
    if result["benchmark"] == "faults":
        return faults_report(result)
    peak, bandwidth = result["peak_flops"] / 1e12, result["bandwidth"] / 1e9
    stated = f" (stated: {result['stated_peak_flops'] / 1e12:,.0f})" if result["stated_peak_flops"] else ""
    facts = (
        f"{result['model']}, {result['weights']} weights, {result['dtype']}; {result['device']}, torch "
        f"{result['torch']}; measured ceilings {peak:,.3g} TFLOP/s{stated} and {bandwidth:,.4g} GB/s; "
        f"{result['question']} question tokens; seed {result['seed']}."
    )
    tables = _latency if result["benchmark"] == "latency" else _throughput
    return "\n\n".join([facts, *tables(result)])


def service_report(result: Mapping[str, Any]) -> str:
    """The service beside its engine: what it was measured on, the rows, and the two compared."""
    head = [
        "asked", "at once", "requests", "answered", "others", "tokens/s", "requests/s", "first token, ms: p50", "p95",
        "p99", "MB more",
    ]  # fmt: skip
    body = []
    for row in result["rows"]:
        others = {"no answer" if status == "0" else status: n for status, n in row["statuses"].items()}
        answered = others.pop("200", 0)
        told = ", ".join(f"{count:,} x {status}" for status, count in others.items()) or "none"
        counts = [f"{row['clients']}", f"{row['requests']:,}", f"{answered:,}", told]
        speeds = [f"{row['tokens_per_second']:,.1f}", f"{row['requests_per_second']:,.1f}"]
        times = [_number(row["ttft_ms"].get(name), ",.1f") for name in ("p50", "p95", "p99")]
        body.append([row["side"], *counts, *speeds, *times, f"{row['grown_mb']:,.1f}"])
    facts = (
        f"{result['model']}, {result['dtype']}; {result['device']}, torch {result['torch']}; {result['slots']} slots; "
        f"up to {result['new_tokens']} tokens an answer, {result['mean_tokens']:.0f} in the mean."
    )
    compared = (
        f"HTTP adds {result['added_ms']:.1f} ms to one client's first token; {result['clients']} clients get "
        f"{result['share_of_engine']:.0%} of the engine's tokens."
    )
    return "\n\n".join([facts, table(head, body), compared])


def faults_report(result: Mapping[str, Any]) -> str:
    """What was asked, a row a kind of hostile request with the statuses of its answers, and the ordinary questions."""
    counts = [{int(status): n for status, n in row["statuses"].items()} for row in result["rows"]]
    below = sorted({status for row in counts for status in row if 0 < status < 500})
    body = []
    for row, seen in zip(result["rows"], counts, strict=True):
        errors = ", ".join(f"{n} x {status}" for status, n in sorted(seen.items()) if status >= 500)
        cells = [str(seen.get(status, 0)) for status in below]
        body.append([row["kind"], str(row["requests"]), *cells, errors or "0", str(seen.get(0, 0))])
    store = "with its store and documents that can be added" if result["documents"] else "without a store"
    facts = (
        f"{result['model']}, {result['dtype']}, {store}; {result['device']}, torch {result['torch']}; "
        f"{result['requests']:,} requests, seed {result['seed']}."
    )
    ordinary = (
        f"Of {result['ordinary']['asked']} ordinary questions, before, after each {result['between']} requests and at "
        f"the end, {result['ordinary']['answered']} were answered."
    )
    return "\n\n".join([facts, table(["kind", "requests", *map(str, below), "5xx", "no answer"], body), ordinary])


def write_tables(document: Path) -> tuple[int, list[str]]:
    """Fill every block of a Markdown file from the file it names, relative to the document, and the plot beside that.

    Returns:
        The number of blocks, and the files that are not there yet: their blocks say so.

    Raises:
        RefragError: the document is not there, or a file holds no benchmark; nothing is written.
    """
    missing = []

    def filled(block: re.Match[str]) -> str:
        path = document.parent / block["file"]
        if not path.is_file():
            missing.append(block["file"])
            return f"{block[1]}\nNot measured yet.\n\n{block[3]}"
        try:
            tables = result_tables(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError) as error:
            raise RefragError(f"{path} holds no result of `refrag bench` ({error!r})") from None
        picture = Path(block["file"]).with_suffix(".png")
        if (document.parent / picture).is_file():
            tables += f"\n\n![{picture.stem}]({picture.as_posix()})"
        return f"{block[1]}\n{tables}\n\n{block[3]}"

    try:
        text = document.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RefragError(f"{document} does not exist") from None
    text, count = BLOCK.subn(filled, text)
    write_text(document, text)
    return count, missing


def _latency(result: Mapping[str, Any]) -> list[str]:
    """For each context what was measured, then what it should be at best."""
    tables = []
    for context in sorted({row["context"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["context"] == context]
        runs = rows[0]["runs"]
        tables.append(f"**{context:,} context tokens**, ms; medians of {runs} runs in turns, [first, third quartile]:")
        tables.append(_measured(rows))
        tables.append("The same rows by formula (appendix A) and by arithmetic limit, with the ceilings above:")
        tables.append(_expected(rows))
    return tables


def _measured(rows: list[Mapping[str, Any]]) -> str:
    head = [
        "system", "from store", "cached", "uncached", "speed-up", "cached", "uncached", "per token", "KV MiB", "MFU"
    ]  # fmt: skip
    body = []
    for row in rows:
        random = " (random projection)" if row["system"] == "refrag" and row.get("projection") == "random" else ""
        times = [_spread(row, name) for name in ("ttft_ms", "ttft_cached_ms", "ttft_uncached_ms")]
        gains = [_number(row[f"ttft_speedup{kind}"], ".2f", "x") for kind in ("", "_cached", "_uncached")]
        kept = f"{row['kv_bytes'] / 2**20:,.1f}"
        body.append([system_label(row) + random, *times, *gains, _spread(row, "ttit_ms"), kept, f"{row['mfu']:.1%}"])
    return table(head, body)


def _expected(rows: list[Mapping[str, Any]]) -> str:
    head = [
        "system", "formula TTFT", "speed-up", "per token", "KV MiB", "limit TTFT", "uncached", "per token", "of limit"
    ]  # fmt: skip
    body = []
    for row in rows:
        formula, limit = row["formula"] or {}, row["limit"]
        least = limit.get("ttft_cached_ms") or limit["ttft_ms"]
        reached = least / (row["ttft_cached_ms"] or row["ttft_ms"])
        kept = formula.get("kv_bytes")
        body.append(
            [
                system_label(row),
                _number(formula.get("ttft_cached_ms") or formula.get("ttft_ms")),
                _number(formula.get("ttft_speedup_cached"), ".2f", "x"),
                _number(formula.get("ttit_ms")),
                _number(kept and kept / 2**20, ",.1f"),
                _number(least),
                _number(limit.get("ttft_uncached_ms")),
                _number(limit["ttit_ms"]),
                f"{reached:.0%}",
            ]
        )
    return table(head, body)


def _throughput(result: Mapping[str, Any]) -> list[str]:
    head = ["system", "batch", "tokens/s", "speed-up", "seconds", "reading", "limit, tokens/s", "KV GiB"]
    body = [
        [
            system_label(row),
            str(row["batch"]),
            _spread(row, "tokens_per_second"),
            f"{row['speedup']:.2f}x",
            _number(row["seconds"]),
            _number(row["read_seconds"]),
            _number(row["limit"]["tokens_per_second"]),
            f"{row['kv_bytes'] / 2**30:,.2f}",
        ]
        for row in result["rows"]
    ]
    first = result["rows"][0]
    about = f"{first['context']:,} context tokens, {result['new_tokens']} new ones; medians of {first['runs']} runs:"
    return [about, table(head, body)]


def search_report(result: Mapping[str, Any]) -> str:
    """What was searched, and a row for each size and index."""
    low, high = result["neighbours"]
    facts = (
        f"{result['real_passages']:,} passages of {result['model']} with their vectors ({result['retriever']}, "
        f"{result['dim']} dimensions), and random neighbours of theirs (cosine similarity {low} to {high}) with the "
        f"same texts; {result['questions']} questions; {result['device']}, lancedb {result['lancedb']}; "
        f"seed {result['seed']}."
    )
    head = [
        "passages", "index", f"recall@{result['wanted']}", "nearest, ms: p50 / p95", "whole search, ms: p50 / p95",
        "built in, s", "index, MB", "all tables, MB", "opened in, s", "RSS, MB: libraries / open / searched",
    ]  # fmt: skip
    return "\n\n".join([facts, table(head, [search_row(row) for row in result["rows"]])])


def search_row(row: Mapping[str, Any]) -> list[str]:
    times = [" / ".join(map(_number, row[f"{name}_ms"].values())) for name in ("nearest", "search")]
    memory = " / ".join(f"{row[f'{when}_rss'] / 1e6:,.0f}" for when in ("library", "open", "searched"))
    sizes = [f"{row[f'{what}_bytes'] / 1e6:,.0f}" for what in ("index", "disk")]
    seconds = [_number(row[f"{what}_seconds"]) for what in ("build", "open")]
    return [
        f"{row['passages']:,}", row["index"], f"{row['recall']:.3f}", *times, seconds[0], *sizes, seconds[1], memory
    ]  # fmt: skip


def timed_on(result: Mapping[str, Any]) -> str:
    """Where the times of `refrag bench frontier` were taken: a line a machine."""
    lines = [
        f"- {machine['device']}: {machine['model']}, k = {machine['k']}, {machine['dtype']}, torch {machine['torch']}; "
        + ", ".join(f"{count:,} questions of {name}" for name, count in machine["timed"].items())
        + f", {machine['runs']} x each; {machine['stored_passages']:,} passages. Retrieval: {machine['retrieval']}."
        for machine in result["machines"]
    ]
    return "\n".join([*lines, *([f"- {UNRECORDED}"] if unrecorded(result) else [])])


def unrecorded(result: Mapping[str, Any]) -> bool:
    """Whether a result of an older `refrag bench frontier` doesn't tell by digests what was judged, and what timed."""
    return not all("digests" in machine for machine in result["machines"])


def frontier_report(result: Mapping[str, Any]) -> str:
    """Where times were taken, and one table: a row a configuration, its quality, then its times on each machine."""
    rows: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        key = (row["k"], row["passages"], system_name(row))
        rows.setdefault(key, {})[row["device"]] = row
    devices = list(dict.fromkeys(row["device"] for row in result["rows"]))
    sets = list(dict.fromkeys(name for row in result["rows"] for name in row["sets"]))
    head = ["system", "decoder tokens", "F1", *map(_set_name, sets)]
    for device in devices:
        head += [f"{device}: first token, ms", "retrieval + choice + projection + prefill"]
    several = len({k for k, *_ in rows}) > 1
    body = []
    for (k, _, name), by_device in rows.items():
        row = next(iter(by_device.values()))
        figures = [row["f1"], *(row["sets"][one]["f1"] if one in row["sets"] else None for one in sets)]
        cells = [f"{name}, k = {k}" if several else name, f"{row['decoder_tokens']:,.0f}", *map(figure, figures)]
        for device in devices:
            cells += _first_token(by_device[device]) if device in by_device else ["–", "–"]
        body.append(cells)
    return "\n\n".join([timed_on(result), table(head, body)])


def quality_and_speed(result: Mapping[str, Any]) -> str:
    """The model card's section on a result of `refrag bench frontier`."""
    tuned = any(row["decoder"].startswith("tuned") for row in result["rows"])
    reader = "A control, tuned for whole passages, reads text" if tuned else "One decoder, this one, reads every row"
    return "\n\n".join([QUALITY_AND_SPEED.format(reader=reader), headline(result), timed_on(result)])


def headline(result: Mapping[str, Any], share: float = 0.1) -> str:
    """REFRAG of one k and number of passages, the first, at p = `share`, beside full context and the nearest text.

    Raises:
        RefragError: one of them is missing on one of the machines.
    """
    k = result["rows"][0]["k"]
    told = {
        "full": "full context: every passage as text",
        "first": "first: the nearest passage alone",
        "sentences": "sentences: those nearest to the question, cut to REFRAG's tokens",
        "plain": "plain: the nearest text, cut likewise",
        "refrag": f"**REFRAG**: a vector for each chunk of {k} tokens, but for the share p = {share:g}, as text",
    }
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        at = row["tokens_of"] if row["share_kept"] is None else row["share_kept"]
        if row["k"] == k and row["passages"] == result["rows"][0]["passages"] and at in (None, share):
            rows.setdefault(row["system"], {})[row["device"]] = row
    devices = list(dict.fromkeys(row["device"] for row in result["rows"]))
    if missing := [f"{one} on {device}" for one in told for device in devices if device not in rows.get(one, {})]:
        raise RefragError(
            f"the frontier has no row of {missing[0]} at p = {share:g}; judge and time full, first, sentences, "
            "plain and refrag there"
        )
    full = next(iter(rows["full"].values()))
    sets = {name: f"F1, {_set_name(name)} ({judged['questions']:,})" for name, judged in full["sets"].items()}
    body = []
    for system, words in told.items():
        row = next(iter(rows[system].values()))
        tokens = f"{row['decoder_tokens']:,.0f} ({full['decoder_tokens'] / row['decoder_tokens']:.1f}x)"
        times = [_number(rows[system][device]["ttft_ms"]) for device in devices]
        body.append([words, *(figure(row["sets"][name]["f1"]) for name in sets), tokens, *times])
    head = ["what the decoder reads", *sets.values(), "prompt tokens", *(f"first token, ms ({one})" for one in devices)]
    return table(head, body)


def _set_name(file: str) -> str:
    return PurePath(file).stem.split("-")[0]


def _first_token(row: Mapping[str, Any]) -> list[str]:
    return [_spread(row, "ttft_ms"), " + ".join(_number(row[f"{part}_ms"]) for part in PARTS)]


def _spread(row: Mapping[str, Any], name: str) -> str:
    """A median with its quartiles."""
    if row[name] is None:
        return "–"
    low, high = row["spread"][name]
    return f"{_number(row[name])} [{_number(low)}, {_number(high)}]"


def _number(value: float | None, form: str = "", unit: str = "") -> str:
    """Three significant digits, or all before the point, unless another form is given."""
    if value is None:
        return "–"
    return format(value, form or (",.0f" if value >= 100 else ".3g")) + unit
