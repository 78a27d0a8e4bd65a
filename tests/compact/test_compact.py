"""Releases: what training changed comes back from few bytes, and nothing else is taken for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from refrag_platform.artifacts.manifest import InputRecord, Manifest
from refrag_platform.cli import app
from refrag_platform.compact.coding import Coding, decode, encode, relative_error
from refrag_platform.compact.packing import Codings, load_packed, model_state, pack, unpack
from refrag_platform.compact.quantization import dequantize, quantize
from refrag_platform.compact.record import read_manifest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.report import evaluation_report
from refrag_platform.model.loading import load_bundle
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text, chunk_tokens
from refrag_platform.project import Project
from refrag_platform.recipes import CptRecipe, Recipe
from refrag_platform.training.core.lora import merge_lora, prepare_encoder
from tests.conftest import ROOT
from tests.encoders import recipe_with

BASE = ROOT / "models" / "tiny"
FINE = Codings(Coding(8), Coding(8), Coding(0, 20_000))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Project(ROOT).recipe("tiny")


@pytest.fixture(scope="session")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights have moved as training moves them, with a policy and a control beside it."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    torch.manual_seed(0)
    for place in (folder, folder.parent / "controls" / "full"):
        model = RefragModel.create(recipe, BASE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and (place == folder or name.startswith("decoder.")):
                    size = parameter.pow(2).mean().sqrt().clamp(min=0.01)
                    parameter.add_(0.05 * size * torch.randn_like(parameter))
        place.mkdir(parents=True)
        model.save(place)
    policy = PolicyNetwork(model.vector_dim, 32, 2, 2, 0.25)
    torch.nn.init.normal_(policy.get_parameter("head.1.weight"))
    policy.save(folder)
    return folder


def prompt(k: int) -> list[list[Text | Chunks]]:
    return [[Text([5, 6, 7]), Chunks(chunk_tokens(list(range(20, 20 + 4 * k)), k)), Text([8, 9])]]


def test_low_rank_updates_of_a_copy_of_the_decoder_s_layers_are_packed(tmp_path: Path) -> None:
    recipe = recipe_with("layers, passage")
    model = RefragModel.create(recipe, BASE)
    prepare_encoder(model, CptRecipe(steps=1, encoder_lora_rank=2), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.encoder.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.05, generator=generator)
    merge_lora(model)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    manifest = pack(tmp_path / "model", recipe, BASE, tmp_path / "release", FINE)
    assert manifest["relative_errors"]["encoder.safetensors"] < 0.1
    found, _ = load_packed(tmp_path / "release", recipe, BASE)
    chunks = chunk_tokens(list(range(20, 80)), model.chunk_size)
    near, exact = found.encode(chunks).detach(), model.eval().encode(chunks).detach()
    assert float((near - exact).norm() / exact.norm()) < 0.05
    small = Codings(FINE.encoder, FINE.decoder, FINE.controls, encoder_layers=Coding(0, 0))
    without = pack(tmp_path / "model", recipe, BASE, tmp_path / "without", small)
    assert without["relative_errors"]["encoder.safetensors"] > 0.2


def test_a_setting_that_is_newer_than_a_release_had_its_default(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    pack(trained, recipe, BASE, release := tmp_path / "release", FINE)
    manifest = json.loads((release / "manifest.json").read_text())
    for key in ("window", "window_tokens", "layers"):
        del manifest["settings"]["encoder"][key]
    (release / "manifest.json").write_text(json.dumps(manifest))
    load_packed(release, recipe, BASE)
    with pytest.raises(ArtifactError, match=r"encoder\.window 'chunk', not 'passage'"):
        load_packed(release, recipe_with("passage"), BASE)


def test_packed_weights_have_the_rates_that_they_were_trained_for(
    trained: Path, recipe: Recipe, tmp_path: Path
) -> None:
    several = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"rates": [1, 2]})})
    pack(trained, several, BASE, tmp_path / "fine", FINE)
    shutil.copytree(trained, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(settings | {"rates": [1, 2]}))
    pack(tmp_path / "model", recipe, BASE, tmp_path / "several", FINE)
    assert load_packed(tmp_path / "fine", several, BASE)[0].rates == (1,)
    assert load_packed(tmp_path / "several", recipe, BASE)[0].rates == (1, 2)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_matrix_comes_back_as_well_as_its_bits_allow(bits: int) -> None:
    matrix = torch.randn(20, 301, generator=torch.Generator().manual_seed(0))
    packed = quantize(matrix, bits)
    assert packed.codes.shape == (20, -(-301 * bits // 8)) and packed.codes.dtype == torch.uint8
    error = float((dequantize(packed, 301, bits) - matrix).norm() / matrix.norm())
    # The best uniform quantizer of a normal distribution, and a little more.
    assert error < [0.61, 0.36, 0.21, 0.12, 0.065, 0.035, 0.02, 0.01][bits - 1]


def test_what_was_rounded_once_comes_back_as_it_is() -> None:
    matrix = torch.randn(20, 301, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None]
    once = dequantize(quantize(matrix, 4), 301, 4)
    assert torch.equal(dequantize(quantize(once, 4), 301, 4), once)


def test_a_row_with_one_large_entry_keeps_it() -> None:
    matrix = 0.01 * torch.randn(20, 301, generator=torch.Generator().manual_seed(0))
    matrix[:, 7] = 1.0
    assert float((dequantize(quantize(matrix, 8), 301, 8) - matrix).norm() / matrix.norm()) < 0.05


def test_a_matrix_of_zeros_comes_back_as_zeros() -> None:
    assert not dequantize(quantize(torch.zeros(2, 5), 3), 5, 3).any()


def test_a_change_of_low_rank_comes_back_from_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(80, 90, generator=generator), "b": torch.randn(70, 90, generator=generator)}
    change = torch.randn(80, 3, generator=generator) @ torch.randn(3, 90, generator=generator)
    trained = {"a": base["a"] + change, "b": base["b"]}
    packed = encode(base, trained, Coding(0, factor_bytes=3 * (80 + 90 + 4)))
    assert {key.rpartition(":")[0] for key in packed} == {"a"}
    assert relative_error(base, trained, decode(base, packed)) < 0.02
    # With fewer bytes the largest part of the change is kept.
    few = encode(base, trained, Coding(0, factor_bytes=80 + 90 + 4))
    assert 0.2 < relative_error(base, trained, decode(base, few)) < 1


def test_larger_parts_of_a_change_have_more_bits() -> None:
    """One spectrum that falls steeply, and one matrix that hardly changes: bytes go where they save most."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(96, 32, generator=generator))[0] for _ in range(2))
    steep = left @ torch.diag(torch.logspace(2, -1, 32)) @ right.t()
    base = {"a": torch.zeros(96, 96), "b": torch.zeros(96, 96)}
    trained = {"a": steep, "b": 0.01 * torch.randn(96, 96, generator=generator)}
    packed = encode(base, trained, Coding(0, factor_bytes=3000))
    assert {key.rpartition(":")[0] for key in packed} == {"a"}
    rows = {int(key.rpartition("-")[2]): len(tensor) for key, tensor in packed.items() if ":left-" in key}
    assert sum(rows.values()) == len(packed["a:left_scale"]) and len(rows) > 3
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert 2700 < size <= 3000
    # With 5 bits for each, 24 ranks would fit, whose rounding alone misses 8%.
    assert relative_error(base, trained, decode(base, packed)) < 0.02


def test_bits_of_the_rest_come_on_top_of_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.zeros(80, 90)}
    low = torch.randn(80, 2, generator=generator) @ torch.randn(2, 90, generator=generator)
    trained = {"a": low + torch.randn(80, 90, generator=generator)}
    errors = [
        relative_error(base, trained, decode(base, encode(base, trained, coding)))
        for coding in (Coding(0, 400), Coding(1), Coding(1, 400))
    ]
    assert errors[2] < min(errors[:2])


def test_a_released_model_answers_as_the_trained_one(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    manifest = pack(trained, recipe, BASE, tmp_path / "release", FINE)
    assert manifest["bytes"] == sum((tmp_path / "release" / name).stat().st_size for name in manifest["files"])
    assert max(manifest["relative_errors"].values()) < 0.02
    found, policy = load_packed(tmp_path / "release", recipe, BASE)
    wanted = load_bundle(str(trained))
    with torch.inference_mode():
        near, exact = found(prompt(found.chunk_size)), wanted.model(prompt(found.chunk_size))
        assert float((near - exact).abs().max()) < 0.01 * float(exact.std())
        vectors = torch.randn(1, 6, found.vector_dim)
        assert policy is not None and wanted.policy is not None
        torch.testing.assert_close(policy(vectors), wanted.policy(vectors), atol=0.1, rtol=0.1)
    for name, tensor in model_state(wanted.model).items():
        if tensor.dim() < 2:
            assert torch.equal(tensor, model_state(found)[name]), name


def test_an_unpacked_folder_is_a_model(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    pack(trained, recipe, BASE, tmp_path / "release", FINE)
    unpack(tmp_path / "release", recipe, BASE, tmp_path / "model")
    bundle = load_bundle(str(tmp_path / "model"), dtype=torch.float32)
    assert bundle.policy is not None and bundle.share_kept == 0.25
    assert bundle.model.encoder_digest() == bundle.model.encoder.digest()
    with pytest.raises(RefragError, match="is there already"):
        unpack(tmp_path / "release", recipe, BASE, tmp_path / "model")


def test_a_control_s_decoder_comes_back_near(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = trained.parent / "controls" / "full"
    coding = Codings(Coding(8), Coding(8), Coding(0, 150_000))
    manifest = pack(trained, recipe, BASE, tmp_path / "release", coding, {"full": folder})
    found, policy = load_packed(tmp_path / "release", recipe, BASE, control="full")
    control, base = RefragModel.load(folder), RefragModel.create(recipe, BASE)
    assert policy is None
    card = (tmp_path / "release" / "README.md").read_text()
    assert "--out unpacked/controls/full --control full" in card
    for line in (line for line in card.splitlines() if line.startswith("refrag ")):
        # Every option is understood; what they name is not there.
        refused = CliRunner().invoke(app, line.split()[1:])
        assert refused.exit_code != 0 and "Usage:" not in refused.output, refused.output
    error = relative_error(model_state(base), model_state(control), model_state(found))
    assert error < 1 and error == pytest.approx(manifest["relative_errors"]["controls/full.safetensors"], abs=1e-3)
    with pytest.raises(ArtifactError, match=r"no controls/none\.safetensors"):
        load_packed(tmp_path / "release", recipe, BASE, control="none")


def test_the_model_card_tells_what_is_recorded(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    row = {"system": "refrag", "passages": 8, "share_kept": 0.1, "exact_match": 0.625, "f1": 0.75}
    result = {"rows": [row | {"decoder_tokens": 120, "ttft_ms": None}], "questions": "dev.jsonl", "model": "unpacked"}
    pack(
        trained,
        recipe,
        BASE,
        tmp_path / "release",
        FINE,
        results=[evaluation_report(result)],
        terms="Trained on X, CC BY 4.0.",
    )
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| refrag, p = 0.1 | 8 | 0.625 | 0.750 |" in card and "questions: dev.jsonl" in card
    assert "`decoder.safetensors`" in card and recipe.decoder.source in card and "## Controls" not in card
    assert "## Data\n\n- corpus: factbook\n- corpus: files\n" in card, (
        "what the recipe trains on, where nothing is given"
    )
    assert read_manifest(tmp_path / "release")["data"] == ["corpus: factbook", "corpus: files"]
    assert "CC BY 4.0" in (tmp_path / "release" / "NOTICE").read_text()
    # A card that was added to is no damaged release.
    (tmp_path / "release" / "README.md").write_text(card + "More.\n")
    load_packed(tmp_path / "release", recipe, BASE)


def stage_manifest(stage: str, metrics: dict[str, Any], hardware: dict[str, Any]) -> Manifest:
    return Manifest(
        stage=stage, model="tiny", hash=f"{stage}.dir", fingerprint="f", settings={}, seed=0, code="c", commit="abc+",
        sources=[InputRecord(path="data/sources/tiny/a.txt", hash="1")] if stage == "corpus" else [],
        started="", finished="", seconds=900, hardware=hardware, libraries={}, metrics=metrics,
    )  # fmt: skip


def test_packed_weights_say_which_artifacts_they_are_of_down_to_the_source_files(
    trained: Path, recipe: Recipe, tmp_path: Path
) -> None:
    figures = {"steps": 300, "first_loss": 2.5, "last_loss": 0.25}
    stages = [
        stage_manifest("corpus", {"documents": 3}, {"cores": 2}),
        stage_manifest("cpt", figures, {"gpus": ["NVIDIA H200"]}),
        stage_manifest("policy", figures, {"cores": 2}),
    ]
    manifest = pack(trained, recipe, BASE, tmp_path / "release", FINE, stages=stages)
    assert list(manifest["training"]) == ["cpt", "policy"]
    assert manifest["stages"]["corpus"]["sources"] == [{"path": "data/sources/tiny/a.txt", "hash": "1"}]
    assert [made["hash"] for made in manifest["stages"].values()] == ["corpus.dir", "cpt.dir", "policy.dir"]
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| cpt | 300 | 2.500 | 0.250 | 0.25 | NVIDIA H200 |" in card
    assert "| policy | 300 | 2.500 | 0.250 | 0.25 | 2 CPU cores |" in card


def test_other_base_weights_are_refused(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    pack(trained, recipe, BASE, tmp_path / "release", FINE)
    with pytest.raises(ArtifactError, match="base weights of digest"):
        load_packed(tmp_path / "release", recipe.model_copy(update={"seed": 1}), BASE)


def test_tables_that_are_not_trained_are_not_kept(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    pack(trained, recipe, BASE, tmp_path / "release", FINE)
    names = {key.rpartition(":")[0] for key in load_file(tmp_path / "release" / "encoder.safetensors")}
    # The tests' model trains its token table.
    assert "encoder.token_table" in names and "encoder.decoder_embeddings" not in names
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(ArtifactError, match="not trained from the recipe's base weights: encoder"):
        pack(trained, other, BASE, tmp_path / "other", FINE)


def test_a_release_is_whole_or_refused(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    release = tmp_path / "release"
    with pytest.raises(RefragError, match=r"MiB, and 0\.0 are allowed"):
        pack(trained, recipe, BASE, release, FINE, limit=1000)
    assert not any(tmp_path.iterdir())
    pack(trained, recipe, BASE, release, FINE)
    with pytest.raises(RefragError, match="--replace"):
        pack(trained, recipe, BASE, release, FINE)
    with pytest.raises(RefragError, match="holds no packed weights"):
        pack(trained, recipe, BASE, trained, FINE, replace=True)
    pack(trained, recipe, BASE, release, FINE, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]
    file = release / "decoder.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="is not the file that"):
        load_packed(release, recipe, BASE)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"decoder\.safetensors is missing"):
        load_packed(release, recipe, BASE)
    (release / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        load_packed(release, recipe, BASE)
