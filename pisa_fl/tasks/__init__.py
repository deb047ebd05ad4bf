"""What is learnt, one file a kind of task: what the loss of an example is, and how well a model does.

A task of your own is a class that derives from `Task`, named by `_target_` in a yaml of yours (docs/extending.md).
"""

from pisa_fl.metric import Metric
from pisa_fl.tasks.base import Task
from pisa_fl.tasks.classification import Classification
from pisa_fl.tasks.next_character import NextCharacter
from pisa_fl.tasks.regression import Regression

__all__ = ["Classification", "Metric", "NextCharacter", "Regression", "Task"]
