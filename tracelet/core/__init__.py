"""The experiment as training code sees it."""
