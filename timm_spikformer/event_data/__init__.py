"""Event-camera data: readers, frames, simulated events, augmentation, and dataset names for timm's scripts."""
