"""The chunk-embedding store: passages and chunks with their vectors, and search over them."""
