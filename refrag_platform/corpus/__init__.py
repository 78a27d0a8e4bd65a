"""From sources to documents, splits, token shards, passages and questions.

Run: `refrag run corpus --model tiny`.
"""
