"""What is done to an update on its way."""
