"""`tokendepot bench ttft`: time to first token of conversations on any OpenAI-compatible server."""
