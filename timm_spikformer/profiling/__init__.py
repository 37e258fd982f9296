"""Firing rates, operations and energy of a Spikformer: `profile` counts, a `Profile` shows."""
from .conventions import COST_MODELS, Conventions, CostModel
from .profile import LayerProfile, Profile, StepProfile, Totals, profile

__all__ = ['COST_MODELS', 'Conventions', 'CostModel', 'LayerProfile', 'Profile', 'StepProfile', 'Totals', 'profile']
