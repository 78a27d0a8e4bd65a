"""The projection: where it starts, and that an optimizer can't take its size to nothing."""

import torch

from refrag_platform.model.projection import Projection


def _projection() -> Projection:
    return Projection(vector_dim=16, width=16, hidden=16, activation="gelu", residual=True, unit=0.02)


def test_a_chunk_starts_as_its_vector_in_the_size_of_an_embedding() -> None:
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_projection()(vectors), 0.02 * vectors)


def test_ten_steps_at_a_rate_of_a_tenth_of_the_unit_hardly_change_the_size() -> None:
    projection, vectors = _projection(), torch.ones(5, 16)
    optimizer = torch.optim.AdamW([projection.gain], lr=2e-3, weight_decay=0.0)
    for _ in range(10):
        projection(vectors).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    size = projection(vectors).detach().abs().mean() / 0.02
    assert 0.97 < float(size) < 1.0
