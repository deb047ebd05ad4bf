"""Make `pisa_fl/data/mnist_mini.npz`: the first 1,000 training and 200 test images of every class of MNIST.

Usage: python experiments/make_mnist_mini.py FOLDER, where FOLDER holds MNIST's four idx files.
"""

import sys
from pathlib import Path

import numpy as np

import pisa_fl.data
from pisa_fl.data.mnist import mnist

TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the first `count` examples of every class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main() -> None:
    """Read the idx files and write the subset into the package."""
    full = mnist(root=sys.argv[1], cache=None, mean=0, std=1)
    train = first_of_each_class(full.train_labels, TRAIN_PER_CLASS)
    test = first_of_each_class(full.test_labels, TEST_PER_CLASS)
    np.savez_compressed(
        Path(pisa_fl.data.__file__).with_name("mnist_mini.npz"),
        train_images=full.train_images[train],
        train_labels=full.train_labels[train],
        test_images=full.test_images[test],
        test_labels=full.test_labels[test],
    )


if __name__ == "__main__":
    main()
