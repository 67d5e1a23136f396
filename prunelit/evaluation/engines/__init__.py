"""Speed of saved models in programs that serve them; vLLM so far."""
