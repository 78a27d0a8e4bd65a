"""The model as a service: engine (no HTTP), OpenAI-shaped API, BentoML service and the package stage."""
