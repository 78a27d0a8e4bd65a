"""The accelerate configs of models/accelerate: accelerate reads them, and each says when to use it."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.project import Project
from refrag_platform.training.launch import _options
from refrag_platform.training.launch_files import LaunchFiles, launch_files
from tests.conftest import ROOT
from tests.planted import MODEL, override

CONFIGS = sorted((ROOT / "models" / "accelerate").glob("*.yaml"))
SEVERAL = {DistributedType.MULTI_GPU, DistributedType.DEEPSPEED, DistributedType.FSDP}


def named(project: Project, name: str) -> LaunchFiles | None:
    override(project, "cpt", {"accelerate_config": name})
    return launch_files(project.recipe_path(MODEL).parent, "cpt", project.recipe(MODEL))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_of_accelerate_s_and_says_when_to_use_it(project: Project, path: Path) -> None:
    config, files = load_config_from_file(str(path)), named(project, f"../accelerate/{path.name}")
    assert files is not None and files.processes == config.num_processes
    assert (config.num_processes > 1) == (config.distributed_type in SEVERAL)
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "When: " in " ".join(comment)
    if files.deepspeed:
        assert json.loads(files.deepspeed.read_text())["zero_optimization"]["zero_hpz_partition_size"] == 8


def test_what_cannot_be_launched_is_named(project: Project) -> None:
    folder = project.recipe_path(MODEL).parent
    with pytest.raises(RecipeError, match=r"cpt.accelerate_config of tiny: no file .*nowhere.yaml"):
        named(project, "nowhere.yaml")
    for wrong in ("- 1\n", "num_processes: [2]\n", "deepspeed_config: {deepspeed_config_file: 3}\n"):
        (folder / "wrong.yaml").write_text(wrong)
        with pytest.raises(RecipeError, match=r"wrong.yaml is no accelerate config .*`accelerate config` writes one"):
            named(project, "wrong.yaml")
    (folder / "deep.yaml").write_text("deepspeed_config: {deepspeed_config_file: none.json}\n")
    with pytest.raises(RecipeError, match=r"deep.yaml: deepspeed_config_file is 'none.json', and there is no "):
        named(project, "deep.yaml")


def test_options_of_this_machine_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_LAUNCH", "--main_process_ip 'node0")
    with pytest.raises(RefragError, match=r"REFRAG_LAUNCH is .*node0.* \(No closing quotation\)"):
        _options()
