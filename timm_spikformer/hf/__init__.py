"""Integration with transformers: configuration, models, registration with the Auto classes, Trainer, remote code."""
