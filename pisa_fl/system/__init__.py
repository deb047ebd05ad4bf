"""What is asked of the machine: files, the terminal's text, PyTorch's settings."""
