"""Serves a model over the OpenAI protocol: `hasten serve`. Everything but `app` and `protocol` runs without FastAPI."""
