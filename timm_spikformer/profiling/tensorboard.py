"""Log profiles to TensorBoard from a custom training loop. For transformers' Trainer, use `ProfileCallback`."""
from typing import Any, Dict, Optional

from .activity import Activity
from .counting import Profile
from .pictures import draw

__all__ = ['log_profile', 'scalars']


def scalars(profile: Profile) -> Dict[str, float]:
    """Return scalars to log by name: firing rates, operations and energy (mJ) per image, and accuracy."""
    values = {
        'firing_rate': profile.firing_rate,
        'energy_mj': profile.totals.energy_mj,
        'acs': profile.totals.acs,
        'macs': profile.totals.macs,
    }
    if profile.accuracy is not None:
        values['accuracy'] = profile.accuracy
    for name, totals in profile.groups.items():
        values[f'energy_mj/{name}'] = totals.energy_mj
    for x in profile.layers:
        if x.firing_rate is not None:
            values[f'firing_rate/{x.name}'] = x.mean_firing_rate
            values[f'silent/{x.name}'] = x.silent
    return values


def log_profile(writer: Any, profile: Profile, step: int, activity: Optional[Activity] = None) -> None:
    """Log the scalars and figures of a profile to TensorBoard.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        profile: Profile to log.
        step: Training step or epoch.
        activity: Activity to log figures of, see `render`.
    """
    for name, value in scalars(profile).items():
        writer.add_scalar(f'profile/{name}', value, step)
    for name, figure in draw(profile, activity).items():
        writer.add_figure(f'profile/{name}', figure, step)
    writer.flush()
