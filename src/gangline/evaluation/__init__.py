"""Whether the answers are right and how fast they come: checks against the plain model, speed, perplexity."""
