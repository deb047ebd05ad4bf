"""What answers for clients: what they are made of, what they remember, and what computes for them."""
