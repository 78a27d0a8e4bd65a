"""Fine-tuning: what the decoder reads of an example, and which of its chunks as tokens."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from refrag_platform.model.decoder import head_weight
from refrag_platform.model.prompts import content_ids, end_of_turn, passage_chunks, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text, lay_out, unchunk
from refrag_platform.recipes import FinetunedRecipe, Recipe, TrainedSystem
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import load_retriever
from refrag_platform.training import finetuned
from refrag_platform.training.core.batch import Batch
from refrag_platform.training.evidence import HAS_ANSWER
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import WINDOWS, FinetunedTask, text_windows
from tests.training.conftest import repeating_documents, write_corpus
from tests.training.test_examples import write_questions

ROWS = 6


@pytest.fixture
def settings(recipe: Recipe) -> FinetunedRecipe:
    tasks = {"rag": 0.5, "multi_turn": 0.5}
    return recipe.finetuned.model_copy(update={"tasks": tasks, "max_passages": 4, "precision": "fp32"})


@pytest.fixture
def examples(settings: FinetunedRecipe, tmp_path: Path) -> Examples:
    return Examples(write_questions(tmp_path / "corpus"), settings, seed=0)


def ready(task: FinetunedTask, step: int = 0) -> Batch:
    batch = task.batch(step, 0, ROWS, 0, 1)
    task.prepare_updates(batch)
    return batch


def wanted(task: FinetunedTask, step: int, row: int, rate: int = 1) -> tuple[Prompt, list[int]]:
    """An example's prompt as evaluation and serving would make it of the chunks that are kept, and its answer."""
    model, example = task.model, task.examples.draw(step, row)
    tokenizer, k = model.tokenizer, model.chunk_size * rate
    passages = [passage_chunks(tokenizer, *task.examples.passages[number], k) for number in example.passages]
    if task.system == "refrag":
        keep = torch.from_numpy(keep_of(task, step, row)).split([len(part.token_ids) for part in passages])
        passages = [part.kept(own) for part, own in zip(passages, keep, strict=True)]
    prompt = rag_prompt(tokenizer, example.question, passages, example.history)
    return prompt, [*content_ids(tokenizer, example.answer), end_of_turn(tokenizer)]


def keep_of(task: FinetunedTask, step: int, row: int) -> NDArray[np.bool_]:
    """Flags of the chunks of a prompt that are kept."""
    (passages,) = (part for part in task._row(step, row).prompt if isinstance(part, Chunks))
    return passages.keep.numpy()


def flags(task: FinetunedTask, steps: int) -> list[NDArray[np.bool_]]:
    return [keep_of(task, step, row) for step in range(steps) for row in range(ROWS)]


def test_a_batch_reads_what_evaluation_and_serving_read(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples
) -> None:
    task = FinetunedTask(model, settings, examples)
    batch = ready(task, step=3)
    whole = [wanted(task, 3, row) for row in range(ROWS)]
    kept = [bool(part.keep.any()) for prompt, _ in whole for part in prompt if isinstance(part, Chunks)]
    assert set(kept) == {True, False}
    layout = lay_out([[*prompt, Text(answer)] for prompt, answer in whole], model.chunk_size, "right")
    length = layout.token_ids.shape[1]
    assert batch["token_ids"].shape[1] >= length and not batch["token_ids"][:, length:].any()
    assert torch.equal(batch["token_ids"][:, :length], layout.token_ids)
    assert torch.equal(batch["chunk_index"][:, :length] >= 0, layout.chunk_index >= 0)
    with torch.no_grad():
        read = task._embeds(batch)[:, :length][layout.attention_mask]
        expected = model.embed([[*prompt, Text(answer)] for prompt, answer in whole], "right")
    torch.testing.assert_close(read, expected.embeds[layout.attention_mask])


def test_the_loss_is_that_of_the_answers_alone(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples
) -> None:
    task = FinetunedTask(model, settings, examples)
    losses = []
    for row in range(ROWS):
        prompt, answer = wanted(task, 1, row)
        with torch.no_grad():
            logits = model([[*prompt, Text(answer)]])[0, -len(answer) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    with torch.no_grad():
        loss, _ = task(ready(task, step=1))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_some_prompts_keep_chunks_up_to_the_recipes_greatest_share_and_the_others_none(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples
) -> None:
    prompts = flags(FinetunedTask(model, settings.model_copy(update={"most_share_kept": 0.5}), examples), 16)
    kept = [(int(keep.sum()), math.ceil(len(keep) / 2)) for keep in prompts]
    assert 0.3 < sum(count == 0 for count, _ in kept) / len(kept) < 0.7
    assert all(count <= most for count, most in kept) and any(count == most for count, most in kept)
    assert any(0 < count < most / 2 for count, most in kept)
    never = FinetunedTask(model, settings.model_copy(update={"kept_prompts_share": 0.0}), examples)
    assert not any(keep.any() for keep in flags(never, 4))


def test_what_is_kept_does_not_depend_on_how_a_step_is_cut(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples
) -> None:
    task = FinetunedTask(model, settings, examples)
    for step in range(4):
        whole = task.batch(step, 0, ROWS, 0, 1)["chunk_index"]
        halves = [task.batch(step, micro, ROWS // 2, 0, 1)["chunk_index"] for micro in range(2)]
        ranks = [task.batch(step, 0, ROWS, rank, 2)["chunk_index"] for rank in range(2)]
        for parts in (halves, ranks):
            counts = torch.cat([(part >= 0).sum(1) for part in parts])
            assert torch.equal(counts, (whole >= 0).sum(1))


def test_of_the_prompts_that_keep_chunks_many_keep_those_with_the_answer_first(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_answer(share: float) -> float:
        """Share of the prompts with gold passages, of those that keep chunks, in which the answer's chunk is kept."""
        monkeypatch.setattr(finetuned, "EVIDENT_SHARE", share)
        drawn = [(step, row, examples.draw(step, row)) for step in range(24) for row in range(ROWS)]
        levels = [(keep_of(task, step, row), task._evidence(one)) for step, row, one in drawn if one.gold]
        found = [bool(keep[level == HAS_ANSWER].any()) for keep, level in levels if keep.any() and level.max() > 1]
        assert len(found) > 20
        return sum(found) / len(found)

    task = FinetunedTask(model, settings.model_copy(update={"most_share_kept": 0.1}), examples)
    assert with_answer(1.0) == 1.0
    assert with_answer(0.0) < 0.5


@pytest.mark.parametrize("system", ["full", "none", "truncated", "plain"])
def test_a_control_reads_the_same_examples_as_text(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples, system: TrainedSystem
) -> None:
    near = PassageRelevance(load_retriever("hash", Path(), "cpu"))
    refrag = FinetunedTask(copy.deepcopy(model), settings, examples)
    task = FinetunedTask(model, settings, examples, system, relevance=near if system == "plain" else None)
    batch = ready(task)
    assert bool((batch["chunk_index"] == -1).all())
    for row in range(ROWS):
        (before, *passages, after), answer = wanted(task, 0, row)
        chunks = [part for part in passages if isinstance(part, Chunks)]
        if system == "plain":
            example = examples.draw(0, row)
            how_near = near.of(example.question, [examples.passages[number] for number in example.passages])
            chunks = [part for _, part in sorted(zip(how_near, chunks, strict=True), key=lambda pair: -pair[0])]
        tokens = [token for part in chunks for token in unchunk(part.token_ids)]
        # As many positions as REFRAG's chunks take in this very prompt.
        keep = keep_of(refrag, 0, row)
        room = len(keep) + int(keep.sum()) * (model.chunk_size - 1)
        kept = {"full": tokens, "none": [], "truncated": tokens[-room:], "plain": tokens[:room]}
        assert isinstance(before, Text) and isinstance(after, Text)
        read = [*before.token_ids, *kept[system], *after.token_ids, *answer]
        assert batch["token_ids"][row, : len(read)].tolist() == read
    loss, _ = task(batch)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.projection.parameters())
    assert head_weight(model.decoder).grad is not None


def test_with_the_encoder_in_training_its_weights_get_gradients(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples
) -> None:
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        expected, _ = (task := FinetunedTask(frozen, settings, examples))(ready(task))
    task = FinetunedTask(model, settings.model_copy(update={"encoder_learning_rate": 0.1}), examples)
    loss, _ = task(ready(task))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.encoder.skip.weight.grad is not None and bool(model.encoder.skip.weight.grad.any())


def test_steps_of_text_continue_a_window_from_its_chunks_or_as_a_control_from_its_tokens(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples, tmp_path: Path
) -> None:
    k = model.chunk_size
    settings = settings.model_copy(update={"text_share": 0.5, "context_tokens": 4 * k, "output_tokens": 5})
    corpus = write_corpus(tmp_path / "text", repeating_documents(64, 4, 8, range(10, 200)))
    windows = text_windows(corpus, settings, model, seed=0)
    assert windows
    task = FinetunedTask(model, settings, examples, windows=windows)
    control = FinetunedTask(model, settings, examples, "full", windows)
    texts = {tuple(window) for window in windows.batch(0, 0, WINDOWS).tolist()}
    kinds = set()
    for step in range(8):
        batch, full = ready(task, step), ready(control, step)
        continued = len(batch["answers"]) == ROWS * 5 and batch["chunk_rows"].shape == (ROWS, 4)
        kinds.add(continued)
        if not continued:
            continue
        assert torch.equal(batch["answers"], full["answers"])
        for row, read in enumerate(full["token_ids"].tolist()):
            answer = full["answers"][row * 5 : row * 5 + 5].tolist()
            assert read[0] == model.start_token_id and read[1 + 4 * k : 6 + 4 * k] == answer
            assert tuple(read[1 : 6 + 4 * k]) in texts
        assert torch.isfinite(task(batch)[0])
    assert kinds == {True, False}
