"""Event-camera data: readers, frames, simulated events, transforms, and access by name for timm's scripts."""
