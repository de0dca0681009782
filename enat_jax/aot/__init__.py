"""What a run needs of devices that are not here: its programs, compiled ahead of time."""
