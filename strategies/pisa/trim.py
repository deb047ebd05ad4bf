"""Gradients against which a few clients cannot do much: outliers are moved to the nearest that is not one.

Of n gradients, element by element, the k = floor(trim n) greatest take the value of the next one below, the k least
that of the next one above: their mean is the Winsorized mean (Tukey 1962; Wilcox, Introduction to Robust Estimation
and Hypothesis Testing, 2.2.3). With trim = 1/2 all that is left is the median (Yin, Chen, Ramchandran, Bartlett, ICML
2018, arXiv 1803.01498, which analyses it and the trimmed mean). Up to k liars among those who answer can then move no
element beyond what some honest client said, whatever they send.

It is taken from gradients, and not from residuals g_i + pi_i: a client's dual follows whatever it says, so that a
residual soon looks like anybody's. The fixed point is that of the Winsorized gradients. Where honest clients differ,
it is another one than that of their mean, the more the greater the skew (Karimireddy, He, Jaggi, ICLR 2022, arXiv
2006.09365): with one class a client, an outlier may be all that is known of a class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 2**22
"""Numbers that are sorted at once: 16 MB."""


def trimmed(gradients: Mapping[int, Tensor], trim: float) -> dict[int, Tensor]:
    """Gradients (d,) by client number, their outliers moved; as they are, where trim is too little for one client.

    Args:
        gradients: g_i of those who answered.
        trim: Share of the clients whose elements are moved at either end, in [0, 1/2].
    """
    rows = torch.stack(list(gradients.values()))
    count = len(rows)
    low = min(int(trim * count), (count - 1) // 2)  # of an even number two are left: their mean is the median
    if low:
        for part in rows.split(max(1, CHUNK // count), dim=1):
            ordered = part.sort(dim=0).values
            least, greatest = ordered[low], ordered[count - 1 - low]
            part.clamp_(least, greatest)
    return dict(zip(gradients, rows, strict=True))
