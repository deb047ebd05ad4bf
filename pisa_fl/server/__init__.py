"""What stands between a server half and its clients."""
