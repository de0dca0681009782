"""Settings of trained models compared."""
