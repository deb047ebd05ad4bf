"""Differential privacy: whose data is kept from whom, by which noise, and what that is worth (docs/privacy.md).

`Central`, `Local` and `Examples` are the promises; whatever a client tells of its data passes through one Gaussian
mechanism, and all else follows from what came out of it.
"""

from pisa_fl.privacy.account import Account
from pisa_fl.privacy.base import Privacy
from pisa_fl.privacy.central import Central
from pisa_fl.privacy.examples import Examples
from pisa_fl.privacy.local import Local

__all__ = ["Account", "Central", "Examples", "Local", "Privacy"]
