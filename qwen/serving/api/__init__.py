"""The HTTP APIs: OpenAI's, and Anthropic's Messages API."""
