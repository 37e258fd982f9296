"""Log profiles to TensorBoard from a custom training loop. For transformers' Trainer, use `ProfileCallback`."""
from typing import TYPE_CHECKING, Dict, Optional

from .activity import Activity
from .counting import Profile
from .pictures import draw

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ['log_profile']


def _scalars(profile: Profile) -> Dict[str, float]:
    """Return the scalars to log by name."""
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


def log_profile(
        writer: 'SummaryWriter',
        profile: Profile,
        step: int,
        activity: Optional[Activity] = None,
) -> None:
    """Log the scalars and figures of a profile to TensorBoard.

    The scalars are, per image: firing_rate, energy_mj (millijoules), acs, macs, energy_mj/GROUP, firing_rate/LAYER and
    silent/LAYER, the fraction of silent neurons; and accuracy (0 to 1, not percent), if the data has labels. All names
    start with profile/.

    Args:
        writer: Writer to log with.
        profile: Profile to log.
        step: Training step or epoch.
        activity: Activity whose figures are logged too: spike rasters, attention maps and reconstructions.
    """
    for name, value in _scalars(profile).items():
        writer.add_scalar(f'profile/{name}', value, step)
    for name, figure in draw(profile, activity).items():
        writer.add_figure(f'profile/{name}', figure, step)
    writer.flush()
