"""REFRAG (arXiv 2509.01092) as a platform: corpus, chunks, training, evaluation, serving.

Nothing happens at import. The library knows nothing of Dagster; `assets/` is the thin skin over it.
"""

__version__ = "0.1.0"
