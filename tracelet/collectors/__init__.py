"""What tracelet finds out by itself about where a run takes place."""
