"""Firing rates, operations and energy of a Spikformer: `profile` returns a `Profile`; other functions display it."""
from ..lazy import import_on_demand

# Imported on demand, because `profile` does not need the dependencies for drawing
_MODULES = {
    'Activity': '.activity',
    'COST_MODELS': '.conventions',
    'Conventions': '.conventions',
    'CostModel': '.conventions',
    'LayerProfile': '.counting',
    'Profile': '.counting',
    'StepProfile': '.counting',
    'Totals': '.counting',
    'log_profile': '.tensorboard',
    'measure_times': '.run',
    'print_profile': '.report',
    'print_steps': '.report',
    'profile': '.counting',
    'record_activity': '.activity',
    'render': '.pictures',
    'render_events': '.pictures',
    'render_probabilities': '.pictures',
    'to_dark': '.pictures',
    'write_report': '.report',
}

__all__ = list(_MODULES)

__getattr__ = import_on_demand(__name__, _MODULES)
