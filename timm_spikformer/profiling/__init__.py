"""Firing rates, operations and energy of a Spikformer: `profile` counts, a `Profile` holds, and the rest shows it."""
from .conventions import COST_MODELS, Conventions, CostModel
from .counting import LayerProfile, Profile, StepProfile, Totals, profile
from .pictures import render
from .report import print_profile, print_steps, write_report
from .samples import Samples, look
from .tensorboard import log_profile

__all__ = [
    'COST_MODELS',
    'Conventions',
    'CostModel',
    'LayerProfile',
    'Profile',
    'Samples',
    'StepProfile',
    'Totals',
    'log_profile',
    'look',
    'print_profile',
    'print_steps',
    'profile',
    'render',
    'write_report',
]
