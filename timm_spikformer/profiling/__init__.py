"""Firing rates, operations and energy of a Spikformer: `profile` measures a `Profile`; the rest presents it."""
from .activity import Activity, record_activity
from .conventions import COST_MODELS, Conventions, CostModel
from .counting import LayerProfile, Profile, StepProfile, Totals, profile
from .pictures import render
from .report import print_profile, print_steps, write_report
from .tensorboard import log_profile

__all__ = [
    'Activity',
    'COST_MODELS',
    'Conventions',
    'CostModel',
    'LayerProfile',
    'Profile',
    'StepProfile',
    'Totals',
    'log_profile',
    'print_profile',
    'print_steps',
    'profile',
    'record_activity',
    'render',
    'write_report',
]
