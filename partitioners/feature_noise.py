"""Noise-based feature imbalance: the same labels everywhere, but noisier images at some clients."""

import math

from partitioners.iid import IidPartitioner


class FeatureNoisePartitioner(IidPartitioner):
    """An iid deal; client i's images are to get Gaussian noise of standard deviation sigma * i / clients.

    NIID-Bench (arXiv 2102.02079). Its paper writes Gau(sigma * i / N) and calls the argument a variance;
    its code, which made its tables, scales the *standard deviation*, and so does this class. (The code
    divides by N - 1 where the paper and this class divide by N.) Whoever loads the images adds the noise.

    Args:
        num_partitions: number of clients.
        seed: of the deal.
        sigma: noise level, in units of pixel values from 0 to 1; at least 0.
    """

    def __init__(self, num_partitions: int, seed: int, sigma: float) -> None:
        super().__init__(num_partitions, seed)
        if type(sigma) not in (int, float) or not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must be zero or positive, got {sigma!r}")
        self._sigma = sigma

    def noise_std(self, partition_id: int) -> float:
        """Standard deviation of client `partition_id`'s noise, in units of pixel values from 0 to 1."""
        return self._sigma * partition_id / self.num_partitions
