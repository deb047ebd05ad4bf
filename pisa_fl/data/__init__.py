"""Image data sets: one dataclass, `ImageData`, and one loader function for each `conf/data/<name>.yaml`.

A data set of your own is a function that returns `ImageData`, named by `_target_` in a yaml of yours.
"""

from pisa_fl.data.image_data import Augmentation, ImageData

__all__ = ["Augmentation", "ImageData"]
