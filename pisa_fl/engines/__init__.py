"""Engines carry messages between the server half and the clients; algorithms do not know which one they run on."""
