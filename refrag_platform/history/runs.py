"""Record a model's run in Git on a branch of its own, runs/NAME. Run: `refrag commit --model NAME`.

Everything goes through a temporary index and Git's plumbing, so that the user's index, working tree and
current branch stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.dials import only_models, require_named
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history import dvc
from refrag_platform.history.git import Git
from refrag_platform.history.pipeline import FILE_NAME as PIPELINE_FILE
from refrag_platform.project import DIALS, Project
from refrag_platform.recipes import extended
from refrag_platform.stages import STAGES


def branch(model: str) -> str:
    """The Git branch that holds the runs of a model."""
    return f"runs/{model}"


def commit_run(project: Project, model: str, message: str | None = None) -> str:
    """Commit dvc.lock, the model's manifests and reports, and what they were made from; return the commit.

    The commit holds HEAD's files, over them the pipeline's files, the recipe and the stages' code as they are
    in the working tree (what DVC hashed); its params.yaml names this model alone, so that `dvc pull` in a
    clone of the branch looks for nothing that was never made, and its dvc.yaml declares the fine-tuned model
    as DVC's artifact of that name, which `dvc artifacts get` looks up by release tag. Its parents are the
    branch's tip and HEAD, as far as neither contains the other. When nothing is new, the branch's tip is
    returned.

    Raises:
        ArtifactError: the model has no artifact, or one that is not the one in dvc.lock and can't be
            recorded as it is (see `dvc.record`).
        RefragError: no Git repository or no commit yet; params.yaml does not name the model; the branch is
            checked out; it moved meanwhile.
    """
    dvc.ensure_repo(project)
    manifests = _recorded_manifests(project, model)
    git = Git(project.root)
    head = git.revision("HEAD")
    if head is None:
        raise RefragError(f"{project.root} has no commit yet; `git commit` the project first")
    ref = f"refs/heads/{branch(model)}"
    if git.run("symbolic-ref", "--quiet", "HEAD", check=False) == ref:
        raise RefragError(
            f"{branch(model)} is checked out here, and committing to it would leave the index behind; "
            "change to a branch of your own first: git switch -c NAME"
        )
    tip = git.revision(ref)
    tree = _tree(project, model, head, manifests)
    if tip is not None and git.run("rev-parse", f"{tip}^{{tree}}") == tree:
        return tip
    parents = [commit for commit in (tip, head) if commit is not None]
    if tip is not None and git.contains(tip, head):
        parents = [tip]
    elif tip is not None and git.contains(head, tip):
        parents = [head]
    text = message or f"Run of {model}: {', '.join(manifest.stage for manifest in manifests)}"
    arguments = [argument for parent in parents for argument in ("-p", parent)]
    commit = git.run("commit-tree", tree, *arguments, "-m", text)
    git.run("update-ref", "-m", f"refrag commit: {text}", ref, commit, tip or "")
    return commit


def _recorded_manifests(project: Project, model: str) -> list[Manifest]:
    """The manifests of the model's artifacts, each of which is in dvc.lock afterwards.

    Raises:
        ArtifactError: there is none, or one can't be recorded.
    """
    project.recipe(model)
    require_named(project, model)
    folders = [project.stage_dir(stage, model) for stage in STAGES]
    manifests = [Manifest.read(folder) for folder in folders if (folder / FILE_NAME).is_file()]
    if not manifests:
        raise ArtifactError(f"{model} has no artifact to commit; `refrag run all --model {model}` makes them")
    changed = [one.stage for one in manifests if dvc.recorded_hash(project, one.stage, model) != one.hash]
    if changed:
        dvc.record_all(project, dict.fromkeys(changed), model)
    return manifests


def _tree(project: Project, model: str, head: str, manifests: list[Manifest]) -> str:
    """Git's tree of the run, built in an index of its own."""
    code = {path for manifest in manifests for path in STAGES[manifest.stage].code(project.root)}
    recipes = extended(project.recipe_path(model))
    # The release may have been packed anew since HEAD: a run that starts from it needs the files that it saw.
    recipe = [*(path for file in recipes for path in file.parent.iterdir()), *project.shipped(model).rglob("*")]
    recipe = sorted(path for path in recipe if path.is_file())
    files = [project.stage_dir(manifest.stage, model) / FILE_NAME for manifest in manifests]
    files += [file for file in (project.resolved_recipe(model), project.run_overrides(model)) if file.is_file()]
    for kind in ("metrics", "curves", "learning_rates", "perplexity"):
        files += sorted((project.root / "reports" / kind / model).glob("*.*"))
    with tempfile.TemporaryDirectory(prefix="refrag-") as folder:
        index = Git(project.root, index=Path(folder) / "index")
        index.run("read-tree", head)
        index.run("add", "--all", "--", PIPELINE_FILE, DIALS, *sorted(code), *_relative(project, recipe))
        index.run("add", "--force", "--", "dvc.lock", *_relative(project, files))
        for name, text in ((DIALS, only_models(project, [model])), (PIPELINE_FILE, _with_artifact(project, model))):
            blob = index.run("hash-object", "-w", "--stdin", text=text)
            index.run("update-index", "--cacheinfo", f"100644,{blob},{name}")
        return index.run("write-tree")


def _with_artifact(project: Project, model: str) -> str:
    """The text of dvc.yaml with the model among DVC's artifacts; a clone of runs/NAME has it there already."""
    text = (project.root / PIPELINE_FILE).read_text(encoding="utf-8")
    declared = yaml.safe_load(text).get("artifacts") or {}
    if model in declared:
        return text
    path = project.content("finetuned", model).relative_to(project.root).as_posix()
    entry = f"  {model}: {{path: {path}, type: model}}\n"
    if not declared:
        return f"{text}\nartifacts:\n{entry}"
    return text.replace("\nartifacts:\n", f"\nartifacts:\n{entry}", 1)


def _relative(project: Project, paths: list[Path]) -> list[str]:
    return [path.relative_to(project.root).as_posix() for path in paths if not path.name.startswith(".")]
