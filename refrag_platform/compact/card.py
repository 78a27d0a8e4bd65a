"""README.md and NOTICE of packed weights, written from what is recorded: nothing in them is typed by hand."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from refrag_platform.compact.coding import MIB
from refrag_platform.compact.record import earlier_records
from refrag_platform.markdown import table
from refrag_platform.recipes import Recipe

TUNED = "- A small decoder, trained to answer from the passages that it is given; it says falsehoods fluently."
NOT_TUNED = "- A small decoder, trained to go on with a text; fine-tune it before you ask it questions."
# Of a policy whose training had a loss of evidence.
EVIDENCE = (
    "The policy, which picks the chunks that stay text, is taught by labels which chunks hold the answer, before "
    "reinforcement learning (GRPO) and beside it; *Data* says how many steps of each."
)
LIMITS = """- Compression loses detail: names, numbers, spellings in a chunk that is not expanded may come back wrong.
- English alone. Chunk vectors can be turned back into text: treat them as text for access."""


def model_card(recipe: Recipe, packed: Mapping[str, Any], results: Sequence[str]) -> str:
    """What the packed weights are, how they were made, how good they are, and what they are not for.

    Args:
        packed: its manifest. results: reports of evaluations of the unpacked model.
    """
    is_copy = recipe.encoder.source == "decoder"
    encoder = f"its first {recipe.encoder.layers} layers" if is_copy else recipe.encoder.source
    base = f"{recipe.decoder.source} (decoder) and {encoder} (encoder)"
    parts = [
        f"# {recipe.name}",
        recipe.description,
        f"What training changed of {base}, for REFRAG (arXiv 2509.01092): k = {recipe.encoder.chunk_size} tokens are "
        "read as one vector. `refrag weights unpack` puts it on the packaged weights, whose digest must be "
        f"{packed['base']['digest']}.",
        "## Files",
        table(["file", "KiB", "of the change missed"], _files(packed)),
        f"{packed['bytes'] / MIB:.2f} MiB in all. The change is rounded, which costs quality: figures are to be those "
        "of the model that unpacking makes.",
        *_controls(recipe, packed),
        "## Data",
        "\n".join(f"- {line}" for line in _data(packed)),
        "## Training",
        _training(packed),
        *([EVIDENCE] if "evidence_loss" in packed["training"].get("policy", {}).get("last", {}) else []),
        *(results or ["## Results", "None were given."]),
        "## Limits",
        f"{TUNED if 'finetuned' in packed['training'] else NOT_TUNED}\n{LIMITS}",
    ]
    return "\n\n".join(parts) + "\n"


def notice(recipe: Recipe, data_terms: str = "") -> str:
    """Whose weights are changed here, and on what terms; `data_terms`: the same for training data."""
    lines = [f"{recipe.name}: changes to the weights below, under the terms of these.", ""]
    encoder = recipe.encoder.source
    # An encoder that copies the decoder's layers has its terms.
    for part, source in [("decoder", recipe.decoder.source), *([("encoder", encoder)] if encoder != "decoder" else [])]:
        lines.append(f"- {part}: {source}{_package_terms(source)}")
    return "\n".join([*lines, "", data_terms.strip()]).strip() + "\n"


def _data(packed: Mapping[str, Any]) -> list[str]:
    """What these weights were trained on, and before that those that their training went on from."""
    lines = list(packed["data"])
    for before in earlier_records(packed):
        lines += [f"before that, in the packed weights {before['hash'][:8]}: {line}" for line in before["data"]]
    return lines


def _files(packed: Mapping[str, Any]) -> list[list[str]]:
    errors = packed["relative_errors"]
    return [
        [f"`{name}`", f"{facts['bytes'] / 1024:,.0f}", f"{errors[name]:.1%}" if name in errors else ""]
        for name, facts in packed["files"].items()
    ]


def _controls(recipe: Recipe, packed: Mapping[str, Any]) -> list[str]:
    """How the gap recovered is computed, where tuned controls lie beside the model."""
    systems = [name.partition("/")[2].removesuffix(".safetensors") for name in packed["files"] if "/" in name]
    if not systems:
        return []
    unpack = f"refrag weights unpack models/{recipe.name}/release --out"
    lines = [f"{unpack} unpacked/model"]
    lines += [f"{unpack} unpacked/controls/{system} --control {system}" for system in systems]
    lines.append(
        "refrag evaluate perplexity --model unpacked/model --controls unpacked/controls --documents HELD_OUT "
        f"--context {recipe.evaluation.context_tokens} --output {recipe.evaluation.output_tokens} --json gap.json"
    )
    commands = "\n".join(lines)
    return [
        "## Controls",
        "The decoder, tuned on the same text and asked with these contexts: "
        f"{', '.join(systems)}. The gap recovered is computed against them:",
        f"```\n{commands}\n```",
    ]


def _training(packed: Mapping[str, Any]) -> str:
    """A row for each stage that was trained, then those of the weights before; without a manifest it has no hours."""
    rows, records = [], [packed, *earlier_records(packed)]
    for number, record in enumerate(records):
        for stage, figures in record["training"].items():
            # What was taken over as it was has its row where it was trained.
            if any(figures == older["training"].get(stage) for older in records[number + 1 :]):
                continue
            manifest = record.get("stages", {}).get(stage)
            machine = manifest["hardware"] if manifest else {}
            rows.append(
                [
                    f"{stage} before" if number else stage,
                    f"{figures['steps']:,}",
                    f"{figures['first_loss']:.3f}",
                    f"{figures['last_loss']:.3f}",
                    f"{manifest['seconds'] / 3600:.2f}" if manifest else "–",
                    (", ".join(machine.get("gpus") or []) or f"{machine.get('cores')} CPU cores") if manifest else "–",
                ]
            )
    header = ["stage", "steps", "first loss", "last loss", "hours", "hardware"]
    return table(header, rows) if rows else "No figures were given."


def _package_terms(source: str) -> str:
    kind, _, name = source.partition(":")
    if kind != "package":
        return ""
    try:
        facts = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    named = [facts[key] for key in ("License-Expression", "License") if key in facts]
    terms = next((text.strip().splitlines()[0] for text in named if text.strip()), "its licence is in the package")
    return f" {facts['Version']} ({terms})"
