"""What can be measured of a model: perplexity and divergence, bytes that a token reads, memory."""
