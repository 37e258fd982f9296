"""What a bug report needs to know of an installation: `timm-spikformer env`."""
