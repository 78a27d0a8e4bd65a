"""Training: one loop on accelerate (`core/`) and a file for each stage."""
