"""The policy's episodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from refrag_platform.errors import RecipeError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import PolicyRecipe
from refrag_platform.training.policy import policy_task
from tests.training.conftest import repeating_documents, write_corpus


@pytest.mark.parametrize("share", [0.1, 0.95])
def test_a_budget_that_leaves_nothing_to_choose_is_refused(model: RefragModel, tmp_path: Path, share: float) -> None:
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(64, 4, 8, range(10, 200)))
    settings = PolicyRecipe(steps=1, batch_size=2, share_kept=share, context_tokens=16, output_tokens=8)
    with pytest.raises(RecipeError, match=r"policy\.share_kept .*nothing to choose"):
        policy_task(model, corpus, settings, 0)
