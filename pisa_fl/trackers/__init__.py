"""Trackers: where a run's metrics go beside its run directory, one file each; chosen by `tracker=`."""
