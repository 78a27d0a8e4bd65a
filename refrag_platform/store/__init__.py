"""The chunk-embedding store: passages with retrieval vectors, chunks with encoder vectors, and search over them."""
