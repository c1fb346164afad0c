"""OpenAI's two ways to ask for text, as its clients, vLLM's and lm-eval use them."""
