"""What every algorithm is made of: the two halves' contracts, messages, layouts, rows in memory or on disk."""
