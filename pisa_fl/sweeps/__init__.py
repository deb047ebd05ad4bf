"""Sweeps: many runs, side by side; they go on after an interruption, and may look for the best settings."""
