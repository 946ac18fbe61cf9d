"""The doors: each is a command."""
