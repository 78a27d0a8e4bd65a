"""The Dagster code location: a thin skin over refrag_platform. Look at it with `make ui`."""
