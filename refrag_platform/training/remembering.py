"""A tokenizer for texts that come again and again: in training, one at a time, it would starve a GPU."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast


class RememberingTokenizer:
    """A tokenizer that tokenizes each text once: the same questions and answers come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[object, dict[str, list[int]]] = {}

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        key = (text, *options.items())
        if key not in self._known:
            self._known[key] = {"input_ids": self._tokenizer(text, **options)["input_ids"]}
        return self._known[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
