"""Small-scale study of the claims of the Spikformer V2 paper: protocol, training runs and report."""
