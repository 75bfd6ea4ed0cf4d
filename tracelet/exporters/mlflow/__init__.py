"""Runs, params, tags, metrics and artifacts into MLflow, as native as its own client makes them."""
