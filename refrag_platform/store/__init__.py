"""The chunk-embedding store: passages and chunks with their vectors, and search over them."""

from refrag_platform.store.table import ChunkStore, Hit

__all__ = ["ChunkStore", "Hit"]
