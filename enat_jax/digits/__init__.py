"""The digits data set: token records small enough to prepare on any machine in seconds."""
