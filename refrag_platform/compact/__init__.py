"""A trained model as what training changed of the packaged weights: small enough for Git."""
