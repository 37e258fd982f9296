"""What transformers' own `models/<name>/` holds: configuration and models, and what Trainer needs for them."""
