"""The Great Expectations context: ephemeral, silent, with Data Docs in a folder when one is given."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from great_expectations.data_context import EphemeralDataContext

SITE = "checks"
INDEX = "index.html"
# Animations of the how-to pages, which the site is built without: 3.4 of its 4 MB.
UNUSED_IMAGES = ("glossary_scroller.gif", "validation_failed_unexpected_values.gif", "iterative-dev-loop.png")


def new_context(docs: Path | None) -> EphemeralDataContext:
    """A context without progress bars or usage statistics; `docs` takes the Data Docs site."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    sites = {}
    if docs is not None:
        sites[SITE] = {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites=sites,
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def build_docs(context: EphemeralDataContext, docs: Path) -> Path:
    """Write the site anew from the context's validation results; returns its first page."""
    shutil.rmtree(docs, ignore_errors=True)
    context.build_data_docs([SITE])
    for name in UNUSED_IMAGES:
        (docs / "static" / "images" / name).unlink(missing_ok=True)
    return docs / INDEX
