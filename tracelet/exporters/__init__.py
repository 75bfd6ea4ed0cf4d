"""The destinations: each takes batches and gives one of three answers."""
