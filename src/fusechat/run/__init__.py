"""Runs work once: steps, manifests, locks, processes, progress."""
