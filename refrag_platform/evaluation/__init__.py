"""How good a model is: log-perplexity after a compressed context, and answers to questions over passages."""
