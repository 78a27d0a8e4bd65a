"""What `kubectl kustomize FOLDER` prints, for the part of Kustomize that deploy/kubernetes uses; any other is refused.

A test holds it against kubectl itself, where that is installed.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
KEYS = {"apiVersion", "kind", "resources", "images", "replacements", "patches"}


def render(folder: Path) -> list[Resource]:
    """The resources of a folder with a kustomization.yaml.

    Raises:
        ValueError: it asks for what this doesn't know.
    """
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := wanted.keys() - KEYS:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))} is not known here")
    resources: list[Resource] = []
    for name in wanted["resources"]:
        path = folder / name
        resources += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in wanted.get("patches", ()):
        for resource in _selected(resources, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                _apply(resource, **operation)
    for image in wanted.get("images", ()):
        for container in containers(resources):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in wanted.get("replacements", ()):
        source = replacement["source"]
        (origin,) = _selected(resources, source)
        value: Any = origin
        for key in source["fieldPath"].split("."):
            value = value[_key(value, key)]
        for target in replacement["targets"]:
            for resource in _selected(resources, target["select"]):
                for path in target["fieldPaths"]:
                    _apply(resource, "replace", "/" + path.replace(".", "/"), value)
    return resources


def containers(resources: Sequence[Resource]) -> Iterator[Resource]:
    """The containers of all pods that the resources make, those that begin included."""
    for resource in resources:
        pod = resource.get("spec", {}).get("template", {}).get("spec", {})
        yield from (*pod.get("initContainers", ()), *pod.get("containers", ()))


def _selected(resources: Sequence[Resource], target: Resource) -> list[Resource]:
    """Resources whose kind and name the target's patterns match."""
    return [
        resource
        for resource in resources
        if re.fullmatch(target["kind"], resource["kind"]) and re.fullmatch(target["name"], resource["metadata"]["name"])
    ]


def _apply(resource: Resource, op: str, path: str, value: Any) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *above, last = (part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/"))
    place: Any = resource
    for key in above:
        place = place[_key(place, key)]
    key = _key(place, last)
    if op not in {"add", "replace"} or (isinstance(place, list) and op == "add"):
        raise ValueError(f"{op} {path} is not known here")
    if op == "replace":
        place[key]  # it must be there
    place[key] = value


def _key(place: Any, key: str) -> Any:
    return int(key) if isinstance(place, list) else key
