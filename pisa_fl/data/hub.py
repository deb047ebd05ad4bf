"""Image data sets of the Hugging Face hub."""

import numpy as np

from pisa_fl.data.image_data import Arrays, channels_first


def download(name: str, image: str, classes: tuple[str, ...]) -> Arrays:
    """Fetch and decode a data set with splits `train` and `test` and a column `label`.

    Args:
        name: on the hub, `owner/name`.
        image: the column that holds the images.
        classes: the names of the classes, in the order of their labels.

    Raises:
        FileNotFoundError: if the hub cannot be reached and holds no local copy.
    """
    # imported here since it takes most of a second, which a cached data set need not pay
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"data.root is not set and {name} cannot be downloaded ({error});"
            " set data.root to a folder that holds the data, or use data=mnist_mini"
        ) from error
    arrays = {"classes": np.array(classes)}
    for split in ("train", "test"):
        pixels = np.stack([np.asarray(picture) for picture in splits[split][image]])
        arrays[f"{split}_images"] = channels_first(pixels)
        arrays[f"{split}_labels"] = np.array(splits[split]["label"], np.int64)
    return arrays
