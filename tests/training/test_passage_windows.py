"""Training with an encoder that reads whole passages: what each stage takes for one, and that it gives nothing away."""

from pathlib import Path

import pytest
import torch

from refrag_platform.corpus.question import Question
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Text, lay_out
from refrag_platform.recipes import Recipe
from refrag_platform.training import passage_table
from refrag_platform.training.core.groups import encoder_groups
from refrag_platform.training.episodes import QuestionEpisodes, collate, context_vectors
from refrag_platform.training.examples import Examples
from refrag_platform.training.finetuned import FinetunedTask
from refrag_platform.training.passage_table import encoded_rows
from refrag_platform.training.reconstruction import ReconstructionTask
from tests.encoders import WHOLE_PASSAGES, model_with
from tests.training.test_examples import write_questions
from tests.training.test_finetuned import ROWS, ready, wanted
from tests.training.test_packed import BLOCK, CONTEXT, packed_task

close = torch.testing.assert_close


@pytest.fixture(params=WHOLE_PASSAGES)
def model(request: pytest.FixtureRequest) -> RefragModel:
    return model_with(request.param)


@torch.no_grad()
def test_a_packed_block_is_not_told_what_it_says(model: RefragModel, tmp_path: Path) -> None:
    task = packed_task(model, tmp_path)
    batch = task.batch(0, 0, 2, 0, 1)
    before = task.chunk_embeds(batch).view(2, CONTEXT // model.chunk_size, -1)
    for block in range(1, CONTEXT // BLOCK):
        first = block * BLOCK // model.chunk_size
        other = batch["context"].clone()
        other[:, first:] = other[:, first:].flip(0) + 1
        after = task.chunk_embeds(batch | {"context": other}).view_as(before)
        close(after[:, :first], before[:, :first])
        assert not torch.allclose(after[:, first:], before[:, first:], atol=1e-4)


@torch.no_grad()
def test_a_text_to_be_written_again_is_a_passage(model: RefragModel, recipe: Recipe) -> None:
    task = ReconstructionTask(model, recipe.reconstruction, dict.fromkeys((1, 2, 4, 8)), 0)  # type: ignore[dict-item]
    tokens = torch.randint(3, 900, (3, 8 * model.chunk_size), generator=torch.Generator().manual_seed(0))
    alone = [model.project(model.encode(text.view(8, -1))) for text in tokens]
    close(task.chunk_embeds(tokens), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_fine_tuning_reads_what_evaluation_and_serving_read(
    model: RefragModel, recipe: Recipe, tmp_path: Path, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks of passages, the last of which is filled up.
    monkeypatch.setattr(passage_table, "CHUNKS_AT_ONCE", 8)
    settings = recipe.finetuned.model_copy(
        update={"max_passages": 4, "precision": "fp32", "encoder_learning_rate": rate, "tasks": {"rag": 1.0}}
    )
    task = FinetunedTask(model, settings, Examples(write_questions(tmp_path / "corpus"), settings, seed=0))
    batch = ready(task, step=3)
    prompts = [[*prompt, Text(answer)] for prompt, answer in (wanted(task, 3, row) for row in range(ROWS))]
    layout = lay_out(prompts, model.chunk_size, "right")
    length = layout.token_ids.shape[1]
    assert torch.equal(batch["token_ids"][:, :length], layout.token_ids)
    with torch.no_grad():
        read = task._embeds(batch)[:, :length][layout.attention_mask]
        close(read, model.embed(prompts, "right").embeds[layout.attention_mask], atol=1e-4, rtol=1e-4)
        rows = batch["chunk_rows"]
        kept = task._vectors._remembered(rows).float()
        encoded = encoded_rows(model, task._table, rows)
    close(kept[rows >= 0], encoded[rows >= 0], atol=0.05, rtol=0.01)


@torch.no_grad()
def test_episodes_encode_each_passage_by_itself(model: RefragModel) -> None:
    passages = tuple((f"T{number}", f"It is {'very ' * number} plain, number {number}.") for number in range(5))
    asked = [Question(str(number), "What?", ("It",), passages, gold=(number,)) for number in range(5)]
    drawn = QuestionEpisodes(model.tokenizer, asked, passages=4, chunk_size=4, seed=0).draw(0, range(6))
    assert all(len(one.lengths) == 4 and sum(one.lengths) == len(one.chunks) for one in drawn)
    vectors = context_vectors(model, collate(drawn, 0.25, model.chunk_size))
    for row, one in enumerate(drawn):
        alone = torch.cat([model.encode(part) for part in one.passages])
        close(vectors[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_a_copy_of_the_decoder_s_layers_trains_at_the_encoder_s_rate_and_leaves_the_decoder(recipe: Recipe) -> None:
    model = model_with("layers, passage")
    pretrained, fresh = encoder_groups(model, recipe.reconstruction)
    layer = model.encoder.backbone.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    assert any(parameter is layer for parameter in pretrained["params"])
    assert any(parameter is model.encoder.skip.weight for parameter in fresh["params"])
    model.encode(torch.randint(3, 900, (2, 5, 4)), padded=False).sum().backward()
    assert layer.grad is not None and bool(layer.grad.any())
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
