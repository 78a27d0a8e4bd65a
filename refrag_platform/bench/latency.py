"""Time to the first token, time per further token and key-value bytes: `refrag bench latency --help`.

All systems of `bench.systems` run in one process, in turns, with the same weights through the same runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from refrag_platform.bench.arithmetic import DecoderSize, PaperFormula
from refrag_platform.bench.clock import Ceilings, Times, in_turns
from refrag_platform.bench.machine import fast, free, measured_on
from refrag_platform.bench.shapes import Subject
from refrag_platform.bench.systems import STEPS, Bench, LatencyPlan, MeasuredSystem

MEASURES = ("ttft", "ttft_cached", "ttft_uncached", "ttit", "store_fetch")


def bench_latency(
    subject: Subject, plans: Sequence[LatencyPlan], on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """Rows of all plans, and what they were measured on; `on_row` sees each row as it is made.

    Raises:
        RefragError: a plan can't be carried out.
    """
    for plan in plans:
        plan.check()
    ceilings = Ceilings.measure(subject.device, subject.dtype)
    facts = measured_on(subject.name, subject.weights, subject.decoder, ceilings)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), fast(subject):
        for plan in plans:
            of_plan = _rows(subject, plan, ceilings, facts["stated_peak_flops"])
            rows += of_plan
            for row in of_plan:
                on_row(row)
            free()
    asked = {"question": plans[0].question, "seed": plans[0].seed}
    return {"benchmark": "latency", **facts, **asked, "rows": rows}


def _rows(subject: Subject, plan: LatencyPlan, ceilings: Ceilings, stated: float | None) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        systems = list(Bench(subject, plan, Path(folder)).systems())
        cases = {f"{number} {measure}": case for number, s in enumerate(systems) for measure, case in s.cases.items()}
        times = in_turns(cases, plan.runs, plan.warmup, subject.device)
    rows = []
    for number, system in enumerate(systems):
        measured = {measure: times[f"{number} {measure}"] for measure in system.cases}
        rows.append(_row(system, measured, plan, PaperFormula(DecoderSize.of(subject.decoder)), ceilings, stated))
    _compare(rows)
    return rows


def _row(
    system: MeasuredSystem,
    times: Mapping[str, Times],
    plan: LatencyPlan,
    paper: PaperFormula,
    ceilings: Ceilings,
    stated: float | None,
) -> dict[str, Any]:
    """A row of the result, without the speed-ups. Times in ms, per token where they are of several."""
    each = {measure: 1e3 / (STEPS if measure == "ttit" else 1) for measure in MEASURES}
    medians = {f"{m}_ms": _ms(times[m].median * each[m]) if m in times else None for m in MEASURES}
    limit = {f"{m}_ms": _ms(w.seconds(ceilings.peak, ceilings.bandwidth) * 1e3) for m, w in system.work.items()}
    main = "ttft" if "ttft" in system.work else "ttft_cached"
    mfu = system.work[main].flops / (times[main].median * (stated or ceilings.peak))
    return {
        "system": system.name,
        "k": system.k,
        "context": plan.context,
        **medians,
        "kv_bytes": system.kv_bytes,
        "mfu": round(mfu, 4),
        "formula": _formula(system, plan, paper, ceilings),
        "limit": limit,
        "runs": plan.runs,
        "spread": {f"{m}_ms": [_ms(value * each[m]) for value in times[m].quartiles] for m in times},
        **system.facts,
    }


def _formula(
    system: MeasuredSystem, plan: LatencyPlan, paper: PaperFormula, ceilings: Ceilings
) -> dict[str, float] | None:
    """Appendix A with this machine's rates, s = context, o = question; None for what it doesn't speak of."""
    if system.name not in ("full", "refrag"):
        return None
    positions = plan.context / (system.k or 1)
    values = {
        "ttft_ms" if system.k is None else "ttft_cached_ms": _ms(paper.ttft(positions, ceilings.peak) * 1e3),
        "ttit_ms": _ms(paper.ttit(positions, plan.question, ceilings.bandwidth) * 1e3),
        "kv_bytes": paper.kv_bytes(positions, plan.question),
    }
    if system.k is not None:
        values["ttft_speedup_cached"] = round(paper.ttft_speedup(plan.context, system.k), 3)
    return values


def _compare(rows: list[dict[str, Any]]) -> None:
    """How many times sooner than the full context of the same run each row's first token comes."""
    full = next((row["ttft_ms"] for row in rows if row["system"] == "full"), None)
    for row in rows:
        for kind in ("", "_cached", "_uncached"):
            time = row[f"ttft{kind}_ms"]
            row[f"ttft_speedup{kind}"] = round(full / time, 3) if full and time else None


def _ms(value: float) -> float:
    return round(value, 4)
