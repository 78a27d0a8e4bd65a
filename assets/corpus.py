"""Tokenized corpus: documents split by a stable hash, token shards, passages, questions with answers."""

import dagster as dg

from assets.metadata import Metadata, Published, table
from assets.stage_asset import stage_asset
from refrag_platform.quality.summaries.corpus import SPLITS


def describe(published: Published) -> Metadata:
    """Tokens and documents per split, and the input that was left out."""
    facts = published.read_json("corpus.json")
    counted = ("tokens", "documents", "passages", "questions")
    splits = [
        {"split": split, **{key: facts[key][split] for key in counted if isinstance(facts.get(key), dict)}}
        for split in SPLITS
    ]
    return {
        "splits": table(splits),
        "vocabulary": dg.MetadataValue.int(facts["vocabulary"]),
        "facts": dg.MetadataValue.json(facts),
    }


corpus = stage_asset("corpus", description=__doc__, kinds=("parquet",), describe=describe)
