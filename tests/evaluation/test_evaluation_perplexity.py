"""Log-perplexity of each system is that of a plain forward pass over what the system reads."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.decoders import control_folders, recipe_of, untuned_decoder
from refrag_platform.evaluation.perplexity import evaluate_perplexity
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS, PlainSystem, score_plain, score_refrag
from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.loading import load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Text
from refrag_platform.project import Project
from refrag_platform.training.core import losses

ROW_KEYS = ["system", "tuned", "k", "share_kept", "P16", "P32", "P128", "P512", "windows"]


def plain(model: RefragModel, system: PlainSystem, windows: Windows, batch_size: int = 4) -> np.ndarray:
    return score_plain(model.decoder, system, windows, model.chunk_size, model.start_token_id, batch_size)


@torch.no_grad()
def by_hand(model: RefragModel, prefix: list[int], output: list[int]) -> np.ndarray:
    """The decoder's own logits, one window at a time."""
    logits = model.decoder(torch.tensor([prefix + output])).logits[0].double()
    losses = -logits.log_softmax(-1)[range(len(prefix) - 1, len(prefix) + len(output) - 1), output]
    return losses.numpy()


@pytest.mark.parametrize("system", ["full", "none", "truncated"])
def test_plain_systems_score_what_the_decoder_says_of_their_context(
    model: RefragModel, windows: Windows, system: PlainSystem
) -> None:
    found = plain(model, system, windows)
    for number in range(len(windows)):
        context = windows.context[number].tolist()
        # 32 context tokens in chunks of 4: REFRAG's decoder has 8 positions for them.
        read = {"full": context, "none": [], "truncated": context[-8:]}[system]
        wanted = by_hand(model, [model.start_token_id, *read], windows.output[number].tolist())
        np.testing.assert_allclose(found[number], wanted, atol=1e-4)


@pytest.mark.parametrize("chance", [True, False])
def test_refrag_with_every_chunk_kept_equals_the_full_context(
    model: RefragModel, policy: PolicyNetwork, windows: Windows, chance: bool
) -> None:
    found = score_refrag(model, None if chance else policy, windows, 1.0, batch_size=3)
    np.testing.assert_allclose(found, plain(model, "full", windows), atol=1e-4)


@torch.no_grad()
def test_refrag_scores_what_the_model_says_of_chunks_and_text(
    model: RefragModel, policy: PolicyNetwork, windows: Windows
) -> None:
    found = score_refrag(model, policy, windows, 0.25, batch_size=4)
    for number in range(len(windows)):
        chunks = windows.context[number].view(8, 4)
        ranks = policy(model.encode(chunks)[None])[0].argsort(descending=True)
        keep = torch.zeros(8, dtype=torch.bool)
        keep[ranks[:2]] = True
        output = windows.output[number].tolist()
        logits = model([[Text([model.start_token_id]), Chunks(chunks, keep), Text(output)]])[0].double()
        first = 1 + 6 + 2 * 4 - 1
        wanted = -logits.log_softmax(-1)[range(first, first + len(output)), output]
        np.testing.assert_allclose(found[number], wanted.numpy(), atol=1e-4)


def test_the_batch_size_changes_nothing(model: RefragModel, windows: Windows) -> None:
    for share in (0.0, 0.5):
        one = score_refrag(model, None, windows, share, batch_size=1, seed=3)
        np.testing.assert_allclose(score_refrag(model, None, windows, share, 7, seed=3), one, atol=1e-4)


def test_logits_are_made_a_block_at_a_time(
    model: RefragModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plain(model, "full", windows)
    monkeypatch.setattr(losses, "ROWS", 5)
    np.testing.assert_allclose(plain(model, "full", windows), whole, atol=1e-5)


def test_shuffled_reads_another_document_s_chunks_and_zero_reads_none(model: RefragModel, windows: Windows) -> None:
    others = windows.of_another_document()
    assert others is not None
    swapped = torch.cat([windows.context[others], windows.output], 1)
    moved = score_refrag(model, None, Windows(swapped, windows.documents, 32), 0.0, 4)
    np.testing.assert_allclose(score_refrag(model, None, windows, 0.0, 4, "another"), moved, atol=1e-4)

    other_context = torch.cat([windows.context.flip(0), windows.output], 1)
    zero = score_refrag(model, None, windows, 0.0, 4, "zero")
    same = score_refrag(model, None, Windows(other_context, windows.documents, 32), 0.0, 4, "zero")
    np.testing.assert_allclose(zero, same, atol=1e-5)
    assert not np.allclose(zero, score_refrag(model, None, windows, 0.0, 4))


def test_rows_hold_every_system_and_nulls_beyond_the_output(
    model: RefragModel, policy: PolicyNetwork, windows: Windows
) -> None:
    result = evaluate_perplexity(model, policy, windows, untuned=model.decoder, shares=[0.0, 0.25])
    rows = result["rows"]
    assert [list(row) for row in rows] == [ROW_KEYS] * len(rows)
    assert [(row["system"], row["tuned"], row["share_kept"]) for row in rows] == [
        ("full", False, None),
        ("none", False, None),
        ("truncated", False, None),
        ("refrag", True, 0.0),
        ("refrag", True, 0.25),
        ("refrag_shuffled", True, 0.0),
        ("refrag_zero", True, 0.0),
        ("refrag_none", True, None),
    ]
    assert all(row["k"] == 4 and row["windows"] == 7 for row in rows)
    assert all(row["P16"] > 0 and row["P32"] > 0 and row["P128"] is row["P512"] is None for row in rows)
    assert set(result["gap_recovered"].values()) == {None}
    for row, interval in zip(rows, result["intervals"], strict=True):
        assert interval["P16"][0] <= row["P16"] <= interval["P16"][1]
    gain = next(row for row in result["differences"] if row["over"] == "none")
    assert gain["P16"][0] == pytest.approx(rows[1]["P16"] - rows[3]["P16"], abs=2e-5)


def test_one_document_has_no_shuffled_row_and_no_intervals(model: RefragModel, windows: Windows) -> None:
    alone = Windows(windows.tokens[:3], ["a"] * 3, 32)
    result = evaluate_perplexity(model, None, alone, untuned=model.decoder)
    shuffled = next(row for row in result["rows"] if row["system"] == "refrag_shuffled")
    assert (shuffled["P16"], shuffled["windows"]) == (None, 0)
    assert result["intervals"][0]["P16"] is None


@pytest.fixture
def controls(model: RefragModel, tmp_path: Path) -> Path:
    """Controls that differ from the model: full is the model itself, none a copy with a blunter head."""
    blunt = copy.deepcopy(model)
    with torch.no_grad():
        blunt.decoder.get_output_embeddings().weight.mul_(8)
    for name, control in (("full", model), ("none", blunt)):
        (tmp_path / name).mkdir()
        control.save(tmp_path / name)
    return tmp_path


def test_the_gap_is_counted_against_tuned_controls_only(model: RefragModel, windows: Windows, controls: Path) -> None:
    result = evaluate_perplexity(
        model, None, windows, untuned=model.decoder, controls=control_folders(controls, PLAIN_SYSTEMS)
    )
    tuned = {row["system"]: row["P16"] for row in result["rows"] if row["tuned"]}
    untuned = {row["system"]: row["P16"] for row in result["rows"] if not row["tuned"]}
    assert tuned["full"] == untuned["full"]
    assert tuned["none"] != untuned["none"]
    wanted = (tuned["none"] - tuned["refrag"]) / (tuned["none"] - tuned["full"])
    assert result["gap_recovered"]["P16"] == pytest.approx(wanted, abs=1e-3)
    assert result["gap_recovered"]["P128"] is None
    low, high = result["gap_intervals"]["P16"]
    assert low <= result["gap_recovered"]["P16"] <= high
    assert result["gap_intervals"]["P128"] is None
    assert "truncated" not in tuned


def test_a_folder_without_controls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="full, none, truncated"):
        control_folders(tmp_path, PLAIN_SYSTEMS)


def test_a_control_of_another_vocabulary_is_refused(model: RefragModel, controls: Path) -> None:
    other = RefragModel.load(controls / "none")
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(ArtifactError, match="train it from the same recipe"):
        load_control(controls / "full", like=other)


def test_a_diverged_model_is_refused(model: RefragModel, windows: Windows) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.projection.gain.fill_(torch.nan)
    with pytest.raises(RefragError, match="system refrag gives log-likelihoods that are not finite"):
        evaluate_perplexity(broken, None, windows, untuned=model.decoder)


def test_the_untuned_decoder_is_the_recipe_s_own(
    evaluation_project: Project, model: RefragModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluation_project.root)
    known = recipe_of("tiny", evaluation_project.content("finetuned", "tiny"))
    assert known is not None
    recipe, base = known
    untuned = untuned_decoder(recipe, base, like=model)
    for name, tensor in model.decoder.state_dict().items():
        torch.testing.assert_close(untuned.state_dict()[name], tensor)
    assert recipe_of("/some/folder", Path("/some/folder")) is None
    other = copy.deepcopy(model)
    other.decoder.resize_token_embeddings(len(model.tokenizer) + 8)
    with pytest.raises(RefragError, match="give the recipe that the model was made from"):
        untuned_decoder(recipe, base, like=other)
