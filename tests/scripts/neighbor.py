"""Module that create_model.py imports from its own folder."""
