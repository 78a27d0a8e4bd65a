"""The package stage: model, chunk store and lineage under one exact tag, and the Bento that serves them.

    refrag run package --model tiny

Tags are hashes of what is inside, so the same inputs give the same tags, and what is there already is
not made again. The artifact is package.json, a small lock; models and Bentos lie in BentoML's store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from refrag_platform.artifacts.digest import code_digest, folder_digest, path_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import write_json
from refrag_platform.project import Project
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving import bento
from refrag_platform.serving.settings import VARIABLES
from refrag_platform.stages import STAGES, StageContext

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine

PREFIX = "refrag-"
MODEL, CHUNKS, POLICY, TABLES, RETRIEVER = "model", "chunks", "policy", "tables", "retriever"
RECIPE_FILE = "recipe.json"


def build_package(context: StageContext) -> dict[str, Any]:
    """Put model and Bento into BentoML's store and write package.json.

    Raises:
        RefragError: the store was made by another encoder, or `bentoml build` failed.
    """
    hashes = {name: folder_digest(path) for name, path in context.inputs.items()}
    recipe = context.recipe
    settings = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    packed = (hashes["finetuned"], hashes["chunks"], hashes["policy"])
    model_tag = f"{PREFIX}{recipe.name}:{_version(*packed, settings)}"
    code = code_digest(context.project.root, STAGES["package"].code(context.project.root))
    bento_tag = f"{PREFIX}{recipe.name}:{_version(model_tag, code)}"
    model_made = _save_model(context, model_tag, hashes)
    bento_made = _build_bento(context, model_tag, bento_tag, code)
    lock = {"model_tag": model_tag, "bento_tag": bento_tag, "inputs": hashes, "code": code}
    write_json(context.out / bento.PACKAGE_FILE, lock, sort_keys=True)
    folder = bento.store_path(context.project, "models", model_tag)
    return {
        "model_tag": model_tag,
        "bento_tag": bento_tag,
        "model_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "model_made": model_made,
        "bento_made": bento_made,
    }


def packaged_model(tag: str) -> str:
    """`tag` itself, or the newest refrag model of BentoML's store when it is empty.

    Raises:
        ArtifactError: there is none.
    """
    if tag:
        return tag
    import bentoml

    models = [model for model in bentoml.models.list() if model.tag.name.startswith(PREFIX)]
    if not models:
        raise ArtifactError(
            "BentoML's store holds no refrag model: make one with `refrag run package --model NAME`, and set "
            "BENTOML_HOME to the project's .bentoml folder, where it lies"
        )
    return str(max(models, key=lambda model: model.creation_time).tag)


def model_name(tag: str) -> str:
    """The model of a tag of its package."""
    return tag.removeprefix(PREFIX).split(":")[0]


def load_packaged(folder: Path, live: Path | None = None, tables: str | None = None, vllm: bool = False) -> Engine:
    """The engine of a model in BentoML's store.

    Args: live, vllm: as of `Engine.open`. tables: URL of search tables to be read instead of the model's own.

    Raises:
        ArtifactError: the folder is no such model.
    """
    from refrag_platform.serving.engine import Engine

    try:
        recipe = json.loads((folder / RECIPE_FILE).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no packaged model: {RECIPE_FILE} is missing") from None
    own_retriever = folder / RETRIEVER
    return Engine.open(
        recipe["name"],
        folder / MODEL,
        folder / CHUNKS,
        # The rest may hold keys that only the code of its day knew.
        ServingRecipe.model_validate(recipe["serving"]),
        tables=tables or folder / TABLES,
        retriever=f"path:{own_retriever}" if own_retriever.is_dir() else None,
        policy=folder / POLICY,
        live=live,
        passage_tokens=recipe["corpus"]["passage_tokens"],
        vllm=vllm,
    )


def lineage(context: StageContext) -> dict[str, Any]:
    """Hash, fingerprint, commit and seed of every artifact that went in, by path."""
    root, facts, open_paths = context.project.root, {}, list(context.inputs.values())
    while open_paths:
        content = open_paths.pop()
        name = content.relative_to(root).as_posix()
        if name in facts:
            continue
        manifest = Manifest.read(content.parent)
        facts[name] = {key: getattr(manifest, key) for key in ("hash", "fingerprint", "commit", "seed")}
        facts[name]["inputs"] = {record.path: record.hash for record in manifest.inputs.values()}
        facts[name]["sources"] = {record.path: record.hash for record in manifest.sources}
        open_paths += [root / record.path for record in manifest.inputs.values()]
    return dict(sorted(facts.items()))


def _version(*facts: str) -> str:
    return hashlib.md5("\0".join(facts).encode(), usedforsecurity=False).hexdigest()[:16]


def _save_model(context: StageContext, tag: str, hashes: Mapping[str, str]) -> bool:
    """Copy what serving needs into the store under `tag`; False when it lies there whole already."""
    folder = bento.store_path(context.project, "models", tag)
    if _whole_model(folder):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    store = bento.model_store(context.project)
    import bentoml

    from refrag_platform.store.table import ChunkStore

    recipe = context.recipe
    with bentoml.models.create(
        tag,
        labels={"project": "refrag-platform", "recipe": recipe.name, "maturity": recipe.maturity},
        metadata={"hashes": dict(hashes), "lineage": lineage(context)},
        _model_store=store,
    ) as model:
        inside = Path(model.path)
        # Links here: the store's own copy is the only one that is made.
        for name, stage in ((MODEL, "finetuned"), (CHUNKS, "chunks"), (POLICY, "policy")):
            (inside / name).symlink_to(context.inputs[stage].resolve())
        base = context.project.recipe_path(recipe.name).parent
        ChunkStore.open(context.inputs["chunks"], tables=inside / TABLES, base=base)
        if recipe.chunks.retriever.startswith("path:"):
            (inside / RETRIEVER).symlink_to((base / recipe.chunks.retriever.removeprefix("path:")).resolve())
        (inside / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # model.yaml is written after this, so it names every other file.
        model.info.metadata["contents"] = {entry.name: path_digest(entry) for entry in sorted(inside.iterdir())}
    if not _whole_model(folder):
        raise RefragError(f"{folder} does not hold what was put into it; is the disk full?")
    return True


def _whole_model(folder: Path) -> bool:
    """Whether a model in the store has all its files: a kill may have left half of a copy."""
    try:
        description = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
        contents = description["metadata"]["contents"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False
    return all((folder / name).exists() and path_digest(folder / name) == digest for name, digest in contents.items())


def _build_bento(context: StageContext, model_tag: str, tag: str, code: str) -> bool:
    """`bentoml build` under `tag`; False when it lies there whole already."""
    project = context.project
    folder = bento.store_path(project, "bentos", tag)
    if _whole_bento(project, folder, code):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    name, version = tag.split(":")
    command = [sys.executable, "-m", "bentoml", "build", str(project.root)]
    command += ["--bentofile", "bentofile.yaml", "--name", name, "--version", version]
    command += ["--arg", f"model_tag={model_tag}"]
    # The build imports the service, whose settings are for where it is served: a file of keys need not be here.
    environment = {name: value for name, value in bento.environment(project).items() if name not in VARIABLES}
    # A process of its own: BentoML keeps the service of the first build of a process.
    result = subprocess.run(command, env=environment, cwd=project.root, capture_output=True, text=True, check=False)
    if result.returncode or not _whole_bento(project, folder, code):
        raise RefragError(f"`{' '.join(command[2:])}` failed:\n{(result.stdout + result.stderr)[-4000:]}")
    return True


def _whole_bento(project: Project, folder: Path, code: str) -> bool:
    """Whether a Bento in the store has its description and the very code it is named after."""
    paths = STAGES["package"].code(project.root)
    source = folder / "src"
    complete = (folder / "bento.yaml").is_file() and all((source / path).exists() for path in paths)
    return complete and code_digest(source, paths) == code
