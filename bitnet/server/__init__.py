"""`bitnet serve`: an OpenAI-compatible HTTP server over one Batch, which decodes many requests together."""
