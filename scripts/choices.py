"""A file of choices from runs of `gpu_run.py`: a row a variant, which is the runs that its model went through.

python scripts/choices.py --runs /tmp/runs --out docs/results/choices.json --plot docs/results/choices.png \\
    "no reconstruction=direct" "reconstruction=rfull,cfull" "reconstruction, continued=rfull,rfull2"

`gpu_run.py reconstruct` and `evaluate` must have written into the folder of the run that they judged
(`--model RUNS/NAME/model --out RUNS/NAME`). `results_rows.py` prints the file's Markdown rows.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from results_rows import SCORES, plot_choices

from refrag_platform.files import write_json

SYSTEMS = ("refrag", "refrag_shuffled")


def choice(name: str, runs: list[Path]) -> dict[str, Any]:
    """The row of a variant: {name, decoder, steps, reconstruction, cpt}.

    decoder: what trained of it. steps: of reconstruction, over all runs. reconstruction: rows of reconstruction.json.
    cpt: {steps, refrag: {P16, ...}, refrag_shuffled: {...}}. Both are of the last run that was judged so, and None
    where the model was trained on since.

    Raises:
        BadParameter: a run is missing or unfinished, or the last one was not judged.
    """
    decoder, steps, reconstruction, cpt = "", 0, None, None
    for run in runs:
        settings, summary = _read(run, "settings.json", "train"), _read(run, "summary.json", "train")
        judged = {path.stem for path in run.glob("*.json")} & {"reconstruction", "perplexity"}
        if "train_decoder" in settings:
            decoder, steps = _trained(settings), steps + summary["steps"]
            reconstruction = None
        decoder = decoder or f"{_trained(settings)} (CPT)"
        cpt = None
        if "reconstruction" in judged:
            reconstruction = _read(run, "reconstruction.json", "reconstruct")["rows"]
        if "perplexity" in judged:
            cpt = {"steps": summary["steps"], **_scores(_read(run, "perplexity.json", "evaluate"))}
    if not judged:
        raise typer.BadParameter(f"{name}: {runs[-1]} holds neither reconstruction.json nor perplexity.json")
    return {"name": name, "decoder": decoder, "steps": steps, "reconstruction": reconstruction, "cpt": cpt}


def _read(run: Path, name: str, command: str) -> dict[str, Any]:
    try:
        return json.loads((run / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise typer.BadParameter(f"no {run / name}; `gpu_run.py {command}` writes it when it ends") from None


def _trained(settings: dict[str, Any]) -> str:
    """What of the decoder a run trained; CPT always trains it."""
    if not settings.get("train_decoder", True):
        return "frozen"
    return f"LoRA {settings['lora_rank']}" if settings["lora_rank"] else "all weights"


def _scores(perplexity: dict[str, Any]) -> dict[str, dict[str, float]]:
    rows = {row["system"]: row for row in perplexity["rows"] if row["system"] in SYSTEMS and not row["share_kept"]}
    return {system: {score: row[score] for score in SCORES} for system, row in rows.items()}


def main(
    variants: Annotated[list[str], typer.Argument(help="NAME=RUN,RUN...: a row each, its runs in order.")],
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write (.json).")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it here (.png).")] = None,
    device: Annotated[str | None, typer.Option("--device", help="What the runs ran on, for the record.")] = None,
) -> None:
    """Write a file of choices, and its plot."""
    rows = []
    for variant in variants:
        name, equals, folders = variant.rpartition("=")
        if not (equals and name and folders):
            raise typer.BadParameter(f"{variant!r} is not NAME=RUN,RUN...")
        rows.append(choice(name, [runs / folder for folder in folders.split(",")]))
    result = {"rows": rows, "device": device, "command": f"scripts/choices.py {shlex.join(sys.argv[1:])}"}
    write_json(out, result)
    if plot:
        plot_choices(result, plot)


if __name__ == "__main__":
    typer.run(main)
