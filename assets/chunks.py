"""Chunk-embedding store: passages to search, and chunk vectors by the encoder that is served."""

import dagster as dg

from assets.metadata import Metadata, Published
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """How much is stored, and by which encoder."""
    facts = published.read_json("store.json")
    return {
        "dagster/row_count": dg.MetadataValue.int(facts["passages"]),
        "chunks": dg.MetadataValue.int(facts["chunks"]),
        "encoder_digest": dg.MetadataValue.text(facts["encoder_digest"]),
        "facts": dg.MetadataValue.json(facts),
    }


chunks = stage_asset("chunks", description=__doc__, kinds=("lance",), describe=describe, pool=GPU_POOL)
