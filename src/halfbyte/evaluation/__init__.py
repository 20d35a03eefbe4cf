"""Is it still a good model? Perplexity, and how far the quantized model's predictions are from the original's."""
