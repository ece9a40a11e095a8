"""What each notebook computes: sweeps and claims, so that notebooks hold narrative and calls."""
