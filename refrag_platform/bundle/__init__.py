"""Stages run on another, bare machine: what goes there, what comes back, and how it lands as if made here."""
