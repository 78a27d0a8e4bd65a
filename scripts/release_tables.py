"""Every table of a release on questions, made in one run on a bare GPU machine.

python scripts/release_tables.py run --base /tmp/base --runs /tmp/runs --data /tmp/data --out /tmp/tables

It ranks the pools, tunes a control on full contexts, and lets the release and that control answer everything that
docs/log/2026-11-28-release-tables.md asks. Several jobs run at a time. Stopped and started again, it goes on: a job
whose file is there is done. OUT/N-steps/results has the files without the answers' texts, for docs/results/ and
scripts/results_rows.py.

DATA holds nq-oracle-dev, squadshifts-train, squadshifts-dev, distractors-2wiki, scitldr-train, scitldr-dev and
mtrag-un-dev.jsonl; of a Factbook corpus, made with `corpus.swapped_copies: 0`, factbook-train.jsonl and
factbook-test.jsonl (its questions/) and passages.parquet; and whole.jsonl (`refrag questions whole`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from refrag_platform.corpus.question_files import read_rows
from refrag_platform.corpus.swapping import MARK, swapped
from refrag_platform.files import write_json

SCRIPTS = Path(__file__).parent
RELEASE = SCRIPTS.parent / "models" / "smollm2-135m" / "release"
SWAPPED_COPIES = 2
# By number of passages of the pool: p beside 0.1. Over many passages high p are too long for what was trained.
POOL_SHARES = {1: "0.25", 2: "0.15,0.25", 3: "0.15,0.25", 5: "0.15,0.25", 8: "0.15", 10: "0.15", 20: ""}
app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)


@dataclass(frozen=True)
class Job:
    """A command, the file that it writes last, and the jobs that come before it."""

    name: str
    command: list[str]
    made: Path
    needs: tuple[str, ...] = field(default=())


@app.command()
def run(
    base: Annotated[Path, typer.Option("--base", help="The assembled base folder (gpu_pieces.py).")],
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs: release, full, tuned-STEPS/full.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the question files; ranked ones are made in it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for answers, logs and results.")],
    release: Annotated[Path, typer.Option("--release", help="The release to judge.")] = RELEASE,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the control.")] = 800,
    lanes: Annotated[int, typer.Option("--lanes", min=1, help="Jobs at a time.")] = 7,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each file: to try it.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the control's training; for others give other --runs and --out."),
    ] = None,
) -> None:
    """Make all tables; ends with status 1 if a job failed, whose log is named."""
    # Not by the default, which would leave the jobs running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = [*prepared(base, runs, data, release), control(base, runs, data, steps, settings or [])]
    # What was asked of a few questions, or of another control, to try it is not what is asked for now.
    out /= f"{steps}-steps" + (f"-{limit}-questions" if limit else "")
    answers, logs = out / "answers", out / "logs"
    work += list(asked(base, runs, data, answers, steps, limit))
    failed = run_jobs(work, lanes, logs)
    collect(answers, out / "results", "/".join(release.resolve().parts[-3:]))
    if failed:
        typer.echo(f"failed, or waiting for what failed: {', '.join(failed)}; see {logs}", err=True)
        raise typer.Exit(1)


@app.command()
def swap(
    own: Annotated[Path, typer.Argument(help="The corpus' training questions, with their fields.")],
    ranked: Annotated[Path, typer.Argument(help="The same with ranked passages.")],
    out: Annotated[Path, typer.Argument(help="File of copies to write.")],
) -> None:
    """Copies of ranked questions with another country's answer."""
    fields = {row["id"]: row["field"] for _, row in read_rows(own, ("id", "field"))}
    if copy := next((name for name in fields if MARK in name), None):
        raise typer.BadParameter(f"{own}: {copy} is a copy already; give a corpus made with corpus.swapped_copies: 0")
    rows = [row | {"field": fields[row["id"]]} for _, row in read_rows(ranked)]
    partial = out.with_name(f".{out.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in swapped(rows, SWAPPED_COPIES))
    partial.replace(out)


def prepared(base: Path, runs: Path, data: Path, release: Path) -> list[Job]:
    """The release and its control as runs; the pools, ranked; copies with swapped answers."""

    def rank(name: str, questions: str, pools: Sequence[str], *more: str) -> Job:
        command = [*_refrag("questions", "rank"), "--questions", str(data / questions), *more]
        command += [part for pool in pools for part in ("--pool", str(data / pool))]
        made = data / f"{name}.jsonl"
        return Job(name, [*command, "--retriever", f"path:{base / 'encoder'}", "--out", str(made)], made)

    def unpack(name: str, *more: str) -> Job:
        command = [*_script("gpu_pieces"), "release", str(release), "--base", str(base), "--out", str(runs / name)]
        return Job(name, [*command, *more], runs / name)

    pool = ["nq-oracle-dev.jsonl", "squadshifts-train.jsonl", "squadshifts-dev.jsonl"]
    found = ["--found-only", "--top", "32"]
    swaps = [str(data / name) for name in ("factbook-train.jsonl", "factbook-ranked.jsonl", "swapped-ranked.jsonl")]
    return [
        rank("squad-ranked", "squadshifts-train.jsonl", ["squadshifts-train.jsonl"], *found),
        rank("factbook-ranked", "factbook-train.jsonl", ["passages.parquet"], *found),
        Job("swapped-ranked", [*_script("release_tables"), "swap", *swaps], Path(swaps[-1]), ("factbook-ranked",)),
        unpack("full", "--control", "full"),
        unpack("release"),
        rank("nq-pool", "nq-oracle-dev.jsonl", pool, "--top", "200"),
        rank("squad-pool", "squadshifts-dev.jsonl", pool, "--top", "40"),
        rank("factbook-asked", "factbook-test.jsonl", ["passages.parquet"], "--top", "40"),
    ]


def control(base: Path, runs: Path, data: Path, steps: int, settings: Sequence[str]) -> Job:
    """The control on full contexts, tuned on the release's questions: SQuADShifts' as they are, and all ranked."""
    files = ["squadshifts-train", "squad-ranked", "factbook-ranked", "swapped-ranked"]
    values = {
        "steps": steps,
        "batch_size": 64,
        "micro_batch_size": 16,
        "max_passages": 20,
        "lora_rank": 64,
        "decoder_learning_rate": 5e-4,
        "projection_learning_rate": 0.0,
        "ranked_share": 0.5,
        "questions": f"[{','.join(str(data / f'{name}.jsonl') for name in files)}]",
        "summaries": f"[{data / 'scitldr-train.jsonl'}]",
        "distractors": f"[{data / 'distractors-2wiki.jsonl'}]",
        "save_every": 100,
    }
    command = [*_script("gpu_run"), "train", "finetuned-full", "--base", str(base), "--runs", str(runs)]
    command += ["--start", "full", "--name", f"tuned-{steps}/full"]
    for setting in (*(f"{key}={value}" for key, value in values.items()), *settings):
        command += ["--set", setting]
    made = runs / f"tuned-{steps}" / "full" / "model" / "model.json"
    return Job("control", command, made, ("full", *files[1:]))


def asked(base: Path, runs: Path, data: Path, answers: Path, steps: int, limit: int | None) -> Iterator[Job]:
    """What release and control are asked; each file of answers is named as its table."""

    def rag(
        name: str,
        questions: Sequence[str],
        passages: str,
        systems: str,
        *more: str,
        most: int | None = None,
        needs: Sequence[str] = (),
    ) -> Job:
        command = [*_refrag("evaluate", "rag"), "--model", str(runs / "release" / "model"), "--controls"]
        command += [str(runs / f"tuned-{steps}"), "--recipe", str(base / "recipe.yaml"), "--share-kept", "0.1"]
        for file in questions:
            command += ["--questions", str(data / f"{file}.jsonl")]
        made = answers / f"{name}.json"
        command += ["--passages", passages, "--systems", systems, "--batch-size", "64", "--json", str(made), *more]
        limits = [count for count in (most, limit) if count]
        command += ["--limit", str(min(limits))] if limits else []
        return Job(name, command, made, ("release", "control", *needs))

    mixed = ("--distractors", str(data / "distractors-2wiki.jsonl"))
    pools, strong = ["nq-pool", "squad-pool"], ("--retriever", "strong")
    every, nq = "full,plain,refrag,refrag_wrong,none", ["nq-oracle-dev"]
    # The longest first.
    for count in sorted(POOL_SHARES, key=lambda count: -count * (2 + POOL_SHARES[count].count("."))):
        shares = ("--shares", POOL_SHARES[count]) if POOL_SHARES[count] else ()
        yield rag(f"pool-{count:02d}", pools, str(count), "plain,refrag", *strong, *shares, needs=pools)
    yield rag("nq", nq, "8", f"{every},pruned,untuned", *mixed, most=500)
    yield rag("nq-shares", nq, "8", "full,refrag", "--shares", "0,0.14,0.15,0.25", *mixed, most=500)
    yield rag("nq-untold", nq, "8", "refrag", "--shares", "0.14", "--no-relevance", *mixed, most=500)
    weak = ("--retriever", "weak")
    yield rag("nq-weak", ["nq-pool"], "10,40,80", "plain,refrag", *weak, most=200, needs=["nq-pool"])
    yield rag("factbook", ["factbook-asked"], "20", every, *strong, needs=["factbook-asked"])
    yield rag("factbook-whole", ["whole"], "80", "full,plain,refrag", "--batch-size", "16", most=120)
    yield rag("squadshifts", ["squadshifts-dev"], "8", every, *mixed, most=300)
    yield rag("mtrag", ["mtrag-un-dev"], "5", every, "--max-new-tokens", "96")
    yield rag("scitldr", ["scitldr-dev"], "1", "full,refrag,refrag_wrong,none", "--max-new-tokens", "48", most=300)


def run_jobs(jobs: Sequence[Job], lanes: int, logs: Path) -> list[str]:
    """Run jobs as what they need is done, in the order given, so many at a time; the names of those not done."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, done, failed = [job for job in jobs if not job.made.exists()], set[str](), list[str]()
    done |= {job.name for job in jobs if job.made.exists()}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    begun = time.monotonic()
    try:
        while running or any(done.issuperset(job.needs) for job in waiting):
            for job in [job for job in waiting if done.issuperset(job.needs)][: lanes - len(running)]:
                waiting.remove(job)
                with (logs / f"{job.name}.log").open("wb") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
                running[job.name] = process, time.monotonic()
            time.sleep(0.1)
            for name, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    (failed.append if process.returncode else done.add)(name)
                    now = time.monotonic()
                    verdict = f"ended with status {process.returncode}" if process.returncode else "done"
                    typer.echo(f"{name}: {verdict} after {now - started:.0f} s, at {now - begun:.0f} s")
    finally:
        for process, _ in running.values():
            process.terminate()
    return [*failed, *(job.name for job in waiting)]


def collect(answers: Path, results: Path, model: str) -> None:
    """Results without the answers' texts and this machine's paths; the pool's numbers of passages together in one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    pools = []
    for path in sorted(answers.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        result.pop("answers")
        result |= {"model": model, "device": device}
        for key in ("questions", "distractors"):
            result[key] = ", ".join(Path(file).name for file in (result[key] or "").split(", ")) or None
        result["parts"] = {Path(name).name: part for name, part in result["parts"].items()}
        if path.stem.startswith("pool-"):
            pools.append(result)
        else:
            write_json(results / f"rag-{path.stem}.json", result)
    if pools:
        write_json(results / "rag-pool.json", merged(pools))


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several that asked the same questions with other numbers of passages."""
    first = results[0]
    together = dict(first)
    for key in ("rows", "intervals", "differences"):
        together[key] = [row for result in results for row in result[key]]
    if parts := first.get("parts"):
        together["parts"] = {name: merged([result["parts"][name] for result in results]) for name in parts}
    return together


def _refrag(*verb: str) -> list[str]:
    return [sys.executable, "-m", "refrag_platform", *verb]


def _script(name: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py")]


if __name__ == "__main__":
    app()
