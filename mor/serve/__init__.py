"""The server: OpenAI's API over the engine, with depth as a field."""
