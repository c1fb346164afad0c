"""deltakeeper: compress, measure and serve the difference between a fine-tuned language model and its base."""
