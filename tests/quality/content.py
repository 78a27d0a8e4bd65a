"""Small artifacts in the documented formats, made in no time: a corpus of random ids, an untrained model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.recipes import Recipe
from refrag_platform.stages import StageContext

SPLITS = ("train", "validation", "test")
DOCUMENTS, TOKENS, SHARD_TOKENS = 4, 90, 256
PASSAGES, CHUNKS_OF_PASSAGE = 6, 3


def make(context: StageContext) -> dict[str, Any]:
    """A stage function for any stage: writes a sound artifact, and a loss that falls."""
    base = context.project.recipe_path(context.recipe.name).parent
    write(context.stage, context.recipe, base, context.out, context.inputs)
    lines = [json.dumps({"step": step, "loss": 4.0 - step / 10}) for step in range(1, 11)]
    (context.beside / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return {"last_loss": 3.0, "nested": {"share": 0.5}}


def write(stage: str, recipe: Recipe, base: Path, out: Path, inputs: dict[str, Path]) -> None:
    """Write the artifact of `stage` into the empty folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if stage == "corpus":
        write_corpus(out, base)
    elif stage in {"reconstruction", "cpt", "finetuned"}:
        write_model(stage, recipe, base, out)
    elif stage == "chunks":
        write_chunks(recipe, out, inputs)
    elif stage == "policy":
        write_policy(recipe, out, json.loads((inputs["finetuned"] / "model.json").read_text()))
    elif stage == "evaluation":
        write_evaluation(recipe, out)
    else:
        lock = {"model_tag": "refrag-tiny:0", "inputs": {name: folder_digest(path) for name, path in inputs.items()}}
        write_json(out / "package.json", lock)


def write_corpus(out: Path, base: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size()
    generator = np.random.default_rng(0)
    documents, passages = [], []
    (out / "questions").mkdir()
    for split in SPLITS:
        (out / split).mkdir()
        ids = generator.integers(0, vocabulary, DOCUMENTS * TOKENS).astype("<u2")
        for number, start in enumerate(range(0, len(ids), SHARD_TOKENS)):
            (out / split / f"tokens-{number:05d}.bin").write_bytes(ids[start : start + SHARD_TOKENS].tobytes())
        index = np.array([(number * TOKENS, TOKENS) for number in range(DOCUMENTS)], dtype="<i8")
        np.save(out / split / "documents.npy", index)
        for number in range(DOCUMENTS):
            name = f"{split}-{number}"
            shard, start = divmod(number * TOKENS, SHARD_TOKENS)
            documents.append(
                {"id": name, "title": name, "source": "hand", "split": split, "shard": shard, "start": start}
                | {"tokens": TOKENS, "characters": 400, "sha256": f"hash of {name}"}
            )
            passages.append({"id": f"{name}-p", "document_id": name, "title": name, "text": name, "split": split})
        question = {"id": f"{split}-q", "question": "Which?", "answers": [split], "gold": [0], "field": "name"}
        question |= {"document_id": f"{split}-0", "passages": [{"title": split, "text": split}]}
        (out / "questions" / f"{split}.jsonl").write_text(json.dumps(question) + "\n")
    pq.write_table(pa.Table.from_pylist(documents), out / "documents.parquet")
    pq.write_table(pa.Table.from_pylist(passages), out / "passages.parquet")
    totals = dict.fromkeys(SPLITS, DOCUMENTS * TOKENS)
    facts = {"vocabulary": vocabulary, "dtype": "uint16", "shard_tokens": SHARD_TOKENS, "tokens": totals}
    write_json(out / "corpus.json", facts | {"documents": dict.fromkeys(SPLITS, DOCUMENTS)})
    shutil.copy(base / "tokenizer.json", out / "tokenizer.json")


def write_model(stage: str, recipe: Recipe, base: Path, out: Path) -> None:
    from refrag_platform.model.refrag import RefragModel

    model = RefragModel.create(recipe, base)
    model.save(out)
    modules: dict[str, torch.nn.Module] = {part: getattr(model, part) for part in ("encoder", "projection", "decoder")}
    write_training(out, recipe, stage, modules)


def write_policy(recipe: Recipe, out: Path, model: dict[str, Any]) -> None:
    from refrag_platform.model.policy import PolicyNetwork

    settings = recipe.policy
    shape = (model["vector_dim"], settings.hidden_size, settings.layers, settings.heads, settings.share_kept)
    policy = PolicyNetwork(*shape, encoder_digest=model["encoder_digest"])
    torch.nn.init.normal_(policy.head[1].weight, generator=torch.Generator().manual_seed(0))
    policy.save(out)
    write_training(out, recipe, "policy", {"policy": policy})


def write_training(out: Path, recipe: Recipe, stage: str, modules: dict[str, torch.nn.Module]) -> None:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    figures = {"first_loss": 4.0, "last_loss": 3.0, "steps": getattr(recipe, stage).steps, "parameters": counts}
    write_json(out / "training.json", figures)


def write_chunks(recipe: Recipe, out: Path, inputs: dict[str, Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = json.loads((inputs["finetuned"] / "model.json").read_text())
    generator = torch.Generator().manual_seed(0)
    chunks, k = PASSAGES * CHUNKS_OF_PASSAGE, recipe.encoder.chunk_size
    token_ids = torch.randint(0, 100, (chunks, k), generator=generator, dtype=torch.int32)
    token_ids[CHUNKS_OF_PASSAGE - 1, -1] = -1
    vectors = torch.randn(chunks, model["vector_dim"], generator=generator).half()
    save_file({"token_ids": token_ids, "vectors": vectors}, out / "chunks-00000.safetensors")
    rows = [
        {"id": f"p{number}", "document_id": f"d{number}", "title": "t", "text": "t"}
        | {"chunk_start": number * CHUNKS_OF_PASSAGE, "chunk_count": CHUNKS_OF_PASSAGE}
        | {"retrieval_vector": [1.0, float(number)]}
        for number in range(PASSAGES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "passages.parquet")
    facts = {"encoder_digest": model["encoder_digest"], "passages": PASSAGES, "chunks": chunks, "chunk_size": k}
    write_json(out / "store.json", facts)


def write_evaluation(recipe: Recipe, out: Path) -> None:
    losses = {"full": 2.0, "none": 4.0, "truncated": 3.5, "refrag": 3.0, "refrag_shuffled": 4.1, "refrag_zero": 4.0}
    losses["refrag_none"] = 4.0
    perplexity = [
        {"system": system, "tuned": False, "k": 4, "share_kept": None, "windows": 16}
        | {f"P{count}": loss if count <= recipe.evaluation.output_tokens else None for count in (16, 32, 128, 512)}
        for system, loss in losses.items()
    ]
    scores = {"full": 0.6, "first": 0.4, "plain": 0.3, "sentences": 0.45, "refrag": 0.5, "refrag_wrong": 0.1}
    pairs = [(system, count, f1) for system, f1 in scores.items() for count in recipe.evaluation.passages]
    rag = [
        {"system": system, "passages": count, "share_kept": None, "exact_match": 0.1, "f1": f1, "decoder_tokens": 9}
        for system, count, f1 in [("none", 0, 0.2), *pairs]
    ]
    write_json(out / "perplexity.json", {"rows": perplexity, "gap_recovered": None})
    rates = {"hit_1": 0.5, "hit_5": 0.8, "hit_10": 0.8, "hit_20": 0.9}
    lookups = [{"kind": "in the store", "questions": 8, **rates, "answered": 1.0}]
    systems = ("full", "first", "plain", "sentences", "refrag")
    retrieval = {"lookups": lookups, "rows": [{"system": system, "passages": 4} for system in systems]}
    write_json(out / "rag.json", {"rows": rag, "retrieval": retrieval})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
