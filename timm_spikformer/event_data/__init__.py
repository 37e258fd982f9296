"""Datasets of event cameras: readers, frames of event counts, and a cache of frames."""
