"""Data sets: a class for each kind of data, and one loader function for each `conf/data/<name>.yaml`.

A data set of your own is a function that returns an `ImageData`, or another `DataSet`, named by `_target_` in a yaml of
yours.
"""

from pisa_fl.data.data_set import DataSet
from pisa_fl.data.image_data import Augmentation, ImageData
from pisa_fl.data.table import TableData
from pisa_fl.data.text import TextData

__all__ = ["Augmentation", "DataSet", "ImageData", "TableData", "TextData"]
