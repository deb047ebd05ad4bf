"""Checks of the numbers that models are made of."""

from collections.abc import Sequence


def check_widths(name: str, widths: Sequence[int], places: int | None = None) -> None:
    """Check that widths of layers are at least 1 and, where `places` is given, that there are as many.

    Raises:
        ValueError: They are not; the sentence names the argument.
    """
    if places is not None and len(widths) != places:
        raise ValueError(f"{name} must have {places} numbers, one a layer, got {list(widths)}")
    if any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(f"{name} must hold whole numbers of at least 1, got {list(widths)}")
