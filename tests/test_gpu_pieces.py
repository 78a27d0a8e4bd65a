"""scripts/gpu_pieces.py: a model trained elsewhere comes back in pieces, low-rank updates as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from refrag_platform.compact.coding import Coding
from refrag_platform.compact.packing import Codings, load_packed
from refrag_platform.compact.packing import pack as write_release
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import CptRecipe, read_recipe
from refrag_platform.training.core.lora import SCALE, continue_lora, lora_state, merge_lora, prepare_decoder
from tests.conftest import ROOT, load_script


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "gpu_pieces")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "models" / "tiny", tmp_path / "base"))


@pytest.fixture
def run(pieces: ModuleType, base: Path, tmp_path: Path) -> Path:
    """A run that trained the projection, and the decoder by low-rank updates."""
    model = pieces.base_model(base)
    prepare_decoder(model, CptRecipe(steps=1, lora_rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in [*lora_state(model).values(), model.projection.outer.weight.detach()]:
        tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in lora_state(model).items()}, folder / "lora.safetensors")
    merge_lora(model)
    model.save(folder / "model")
    return folder


def pack(pieces: ModuleType, base: Path, run: Path, out: Path, *further: str) -> Result:
    arguments = ["--base", base, "--model", run / "model", "--lora", run / "lora.safetensors", "--out", out]
    return CliRunner().invoke(pieces.app, ["pack", *map(str, arguments), *further])


def unpack(pieces: ModuleType, base: Path, packed: Path, out: Path) -> RefragModel:
    arguments = ["unpack", packed, "--base", base, "--out", out]
    assert CliRunner().invoke(pieces.app, list(map(str, arguments))).exit_code == 0
    return RefragModel.load(out)


def test_updates_travel_in_place_of_the_decoder_and_give_it_again(
    pieces: ModuleType, base: Path, run: Path, tmp_path: Path
) -> None:
    assert pack(pieces, base, run, tmp_path / "packed").exit_code == 0
    target = tmp_path / "back" / "model"
    found = unpack(pieces, base, tmp_path / "packed", target)
    trained = RefragModel.load(run / "model")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].float(), tensor.float(), atol=2e-2, rtol=2e-2, msg=name)
    updates, back = (load_file(folder / "lora.safetensors") for folder in (run, target.parent))
    for name, tensor in updates.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-2, rtol=1e-2, msg=name)


def test_an_encoder_that_was_rounded_for_a_release_is_rounded_no_further(
    pieces: ModuleType, base: Path, run: Path, tmp_path: Path
) -> None:
    """What is trained on top of it reads the vectors that are released."""
    weight = "projection.outer.weight"
    trained = RefragModel.load(run / "model").state_dict()[weight]
    found = []
    for turn in ("once", "again"):
        assert pack(pieces, base, run, tmp_path / turn, "--encoder-bits", "4").exit_code == 0
        run = tmp_path / f"{turn}-run"
        found.append(unpack(pieces, base, tmp_path / turn, run / "model").state_dict()[weight])
    assert 0.02 < (found[0] - trained).norm() / trained.norm() < 0.2
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.005


def test_a_decoder_that_was_trained_by_more_than_the_updates_is_refused(
    pieces: ModuleType, base: Path, run: Path, tmp_path: Path
) -> None:
    model = RefragModel.load(run / "model")
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight.mul_(1.2)
    model.save(run / "model")
    refused = pack(pieces, base, run, tmp_path / "packed")
    said = " ".join(refused.output.replace("│", " ").split())
    assert refused.exit_code == 2 and "was trained by more than these updates" in said
    assert not (tmp_path / "packed").exists()


def test_updates_are_filled_up_to_the_rank_and_change_nothing_more(pieces: ModuleType, base: Path) -> None:
    """Where a layer was released with fewer factors, or none, the rest can be trained and starts without effect."""
    model, name = pieces.base_model(base), "model.layers.0.mlp.up_proj"
    rows, columns = model.state_dict()[f"decoder.{name}.weight"].shape
    left, right = torch.randn(2, rows), torch.randn(2, columns)
    updates = pieces.updates_of(model, {f"decoder.{name}.weight": (left, right)}, rank=5)
    assert {tensor.shape[0] for key, tensor in updates.items() if key.endswith("lora_A")} == {5}
    torch.testing.assert_close(SCALE * updates[f"{name}.lora_B"] @ updates[f"{name}.lora_A"], left.t() @ right)
    assert updates[f"{name}.lora_A"].abs().sum(1).min() > 0
    other = "model.layers.1.self_attn.q_proj"
    assert updates[f"{other}.lora_A"].abs().sum(1).min() > 0 and not updates[f"{other}.lora_B"].any()


def test_training_goes_on_from_a_release(pieces: ModuleType, base: Path, run: Path, tmp_path: Path) -> None:
    """Its run has the released weights, and updates that are part of them and of the rank that is asked for."""
    recipe = read_recipe(base / "recipe.yaml")
    PolicyNetwork(RefragModel.load(run / "model").vector_dim, 16, 1, 2, 0.25, "none").save(run / "model")
    codings = Codings(Coding(4), Coding(0, 1 << 20, 8), Coding(0, 1 << 20, 8))
    write_release(run / "model", recipe, base, tmp_path / "released", codings)
    out = tmp_path / "goes-on"
    made = CliRunner().invoke(
        pieces.app, ["release", str(tmp_path / "released"), "--base", str(base), "--out", str(out), "--rank", "6"]
    )
    assert made.exit_code == 0, made.output
    again = CliRunner().invoke(
        pieces.app, ["release", str(tmp_path / "released"), "--base", str(base), "--out", str(out)]
    )
    assert again.exit_code == 2 and "there already" in " ".join(again.output.split())
    released, _ = load_packed(tmp_path / "released", recipe, base)
    found, updates = RefragModel.load(out / "model"), load_file(out / "lora.safetensors")
    assert found.encoder_digest() == released.encoder_digest()
    assert {tensor.shape[0] for name, tensor in updates.items() if name.endswith("lora_A")} == {6}
    assert (out / "model" / "policy.json").is_file()
    prepare_decoder(found, CptRecipe(steps=1, lora_rank=6), seed=0)
    continue_lora(found, updates)
    merge_lora(found)
    before = pieces.base_model(base).state_dict()
    for name, tensor in released.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].float(), tensor.float(), atol=1e-2, rtol=1e-2, msg=name)
    name = "decoder.model.layers.0.mlp.up_proj.weight"
    change = SCALE * updates["model.layers.0.mlp.up_proj.lora_B"] @ updates["model.layers.0.mlp.up_proj.lora_A"]
    torch.testing.assert_close(change, released.state_dict()[name] - before[name], atol=1e-2, rtol=1e-2)


def test_a_control_of_a_release_is_a_run_of_its_own(pieces: ModuleType, base: Path, run: Path, tmp_path: Path) -> None:
    recipe = read_recipe(base / "recipe.yaml")
    codings = Codings(Coding(4), Coding(0, 1 << 20, 8), Coding(0, 1 << 20, 8))
    released, out = tmp_path / "released", tmp_path / "full"
    write_release(run / "model", recipe, base, released, codings, controls={"full": run / "model"})
    asked = ["release", str(released), "--base", str(base), "--out", str(out), "--control"]
    refused = CliRunner().invoke(pieces.app, [*asked, "none"])
    assert refused.exit_code == 2 and "none.safetensors among" in refused.output and not out.exists()
    assert CliRunner().invoke(pieces.app, [*asked, "full"]).exit_code == 0
    trained, found, untrained = (
        RefragModel.load(run / "model"),
        RefragModel.load(out / "model"),
        pieces.base_model(base),
    )
    assert found.encoder_digest() == untrained.encoder_digest()
    for name, tensor in trained.decoder.state_dict().items():
        torch.testing.assert_close(found.decoder.state_dict()[name], tensor.float(), atol=1e-2, rtol=1e-2, msg=name)
