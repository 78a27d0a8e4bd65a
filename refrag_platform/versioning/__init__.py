"""DVC, manifests and lineage: which bytes an artifact is and what they were made from."""
