"""The files between training and shipping: written by one process, read by another, whatever happens to either."""
