"""Bento: model, store and policy under one exact tag, built to be served; DVC keeps only the lock."""

import dagster as dg

from assets.metadata import Metadata, Published
from assets.stage_asset import stage_asset


def describe(published: Published) -> Metadata:
    """The lock: tag and digests."""
    return {"lock": dg.MetadataValue.json(published.read_json("package.json"))}


package = stage_asset("package", description=__doc__, kinds=("bentoml",), describe=describe)
