"""Imported by create_model.py from beside it."""
