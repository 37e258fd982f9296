"""The command `timm-spikformer demo`."""
