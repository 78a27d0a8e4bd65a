"""Fine-tuning: what the decoder reads of an example, and that no part of a step waits for the device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from refrag_platform.errors import RecipeError
from refrag_platform.model.decoder import head_weight
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import content_ids, end_of_turn, passage_chunks, rag_prompt
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, Text, lay_out, unchunk
from refrag_platform.model.selection import expand
from refrag_platform.recipes import FinetunedRecipe, Recipe
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from refrag_platform.training.core.loop import Batch
from refrag_platform.training.cpt import System
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


@pytest.fixture(params=["none", "question", "relevance"])
def policy(model: RefragModel, request: pytest.FixtureRequest) -> PolicyNetwork:
    torch.manual_seed(0)
    query, told = "none" if request.param == "none" else "question", request.param == "relevance"
    network = PolicyNetwork(model.vector_dim, 32, 2, 2, 0.4, query, told).eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(network.get_parameter("head.1.weight"))
    if network.reads_question:
        torch.nn.init.normal_(network.match.weight)
    if told:
        torch.nn.init.constant_(network.relevance.weight, 30.0)
    return network


@pytest.fixture
def relevance(policy: PolicyNetwork) -> PassageRelevance | None:
    return PassageRelevance(HashedWords()) if policy.reads_relevance else None


def ready(task: FinetunedTask, step: int = 0) -> Batch:
    batch = task.batch(step, 0, ROWS, 0, 1)
    task.prepare_updates(batch)
    return batch


def wanted(
    task: FinetunedTask,
    policy: PolicyNetwork | None,
    step: int,
    row: int,
    relevance: PassageRelevance | None = None,
) -> tuple[Prompt, list[int]]:
    """An example's prompt as evaluation and serving would make it, and its answer."""
    model, example = task.model, task.examples.draw(step, row)
    tokenizer, k = model.tokenizer, model.chunk_size
    passages = [passage_chunks(tokenizer, *task.examples.passages[number], k) for number in example.passages]
    if relevance:
        shown = [task.examples.passages[number] for number in example.passages]
        passages = relevance.tell(example.question, shown, passages)
    if policy is not None:
        share = policy.share_kept if (step + row) % 2 == 0 else 0.0
        passages = expand(model, passages, share, policy, question=content_ids(tokenizer, example.question))
    prompt = rag_prompt(tokenizer, example.question, passages, example.history)
    return prompt, [*content_ids(tokenizer, example.answer), end_of_turn(tokenizer)]


def kept(prompt: Prompt) -> list[list[bool]]:
    return [part.keep.tolist() for part in prompt if isinstance(part, Chunks)]


def test_a_batch_reads_what_evaluation_and_serving_read(
    model: RefragModel,
    policy: PolicyNetwork,
    relevance: PassageRelevance | None,
    settings: FinetunedRecipe,
    examples: Examples,
) -> None:
    task = FinetunedTask(model, policy, settings, examples, relevance=relevance)
    batch = ready(task, step=3)
    whole = [wanted(task, policy, 3, row, relevance) for row in range(ROWS)]
    if relevance:
        untold = [wanted(task, policy, 3, row) for row in range(ROWS)]
        assert [kept(prompt) for prompt, _ in whole] != [kept(prompt) for prompt, _ in untold]
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
    model: RefragModel, policy: PolicyNetwork, settings: FinetunedRecipe, examples: Examples
) -> None:
    task = FinetunedTask(model, policy, settings, examples)
    losses = []
    for row in range(ROWS):
        prompt, answer = wanted(task, policy, 1, row)
        with torch.no_grad():
            logits = model([[*prompt, Text(answer)]])[0, -len(answer) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    with torch.no_grad():
        loss, _ = task(ready(task, step=1))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_shares_are_drawn_for_each_prompt_where_the_recipe_lists_them(
    model: RefragModel, policy: PolicyNetwork, settings: FinetunedRecipe, examples: Examples
) -> None:
    task = FinetunedTask(model, policy, settings.model_copy(update={"shares_kept": [0.0, 0.5, 1.0]}), examples)
    found = set()
    for step in range(4):
        batch = task.batch(step, 0, ROWS, 0, 1)
        found |= {round(float(k / n), 1) for k, n in zip(batch["kept"], batch["counts"], strict=True) if n % 2 == 0}
        halves = [task.batch(step, micro, ROWS // 2, 0, 1)["kept"] for micro in range(2)]
        assert torch.equal(torch.cat(halves), batch["kept"])
    assert found == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("system", ["full", "none", "truncated"])
def test_a_control_reads_the_same_examples_as_text(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples, system: System
) -> None:
    task = FinetunedTask(model, None, settings, examples, system)
    batch = ready(task)
    assert bool((batch["chunk_index"] == -1).all())
    for row in range(ROWS):
        (before, *passages, after), answer = wanted(task, None, 0, row)
        chunks = [part for part in passages if isinstance(part, Chunks)]
        tokens = [token for part in chunks for token in unchunk(part.token_ids)]
        kept = {"full": tokens, "none": [], "truncated": tokens[-sum(len(part.token_ids) for part in chunks) :]}
        assert isinstance(before, Text) and isinstance(after, Text)
        read = [*before.token_ids, *kept[system], *after.token_ids, *answer]
        assert batch["token_ids"][row, : len(read)].tolist() == read
    loss, _ = task(batch)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.projection.parameters())
    assert head_weight(model.decoder).grad is not None


def test_with_the_encoder_in_training_its_weights_get_gradients(
    model: RefragModel, policy: PolicyNetwork, settings: FinetunedRecipe, examples: Examples
) -> None:
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        expected, _ = (task := FinetunedTask(frozen, policy, settings, examples))(ready(task))
    task = FinetunedTask(model, policy, settings.model_copy(update={"train_encoder": True}), examples)
    loss, _ = task(ready(task))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.encoder.skip.weight.grad is not None and bool(model.encoder.skip.weight.grad.any())


def test_steps_of_text_continue_a_window_from_its_chunks_or_as_a_control_from_its_tokens(
    model: RefragModel, settings: FinetunedRecipe, examples: Examples, policy: PolicyNetwork, tmp_path: Path
) -> None:
    k = model.chunk_size
    settings = settings.model_copy(update={"text_share": 0.5, "context_tokens": 4 * k, "output_tokens": 5})
    corpus = write_corpus(tmp_path / "text", repeating_documents(64, 4, 8, range(10, 200)))
    windows = text_windows(corpus, settings, model, seed=0)
    assert windows
    task = FinetunedTask(model, policy, settings, examples, windows=windows)
    control = FinetunedTask(model, None, settings, examples, "full", windows)
    texts = {tuple(window) for window in windows.batch(0, 0, WINDOWS).tolist()}
    kinds = set()
    for step in range(8):
        batch, full = ready(task, step), ready(control, step)
        continued = len(batch["answers"]) == ROWS * 5 and batch["counts"].tolist() == [4] * ROWS
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


def test_a_context_that_is_not_whole_chunks_is_refused(
    model: RefragModel, settings: FinetunedRecipe, tmp_path: Path
) -> None:
    odd = settings.model_copy(update={"text_share": 0.5, "context_tokens": 4 * model.chunk_size + 1})
    with pytest.raises(RecipeError, match=r"finetuned\.context_tokens is .* multiple of encoder\.chunk_size"):
        text_windows(tmp_path, odd, model, seed=0)
