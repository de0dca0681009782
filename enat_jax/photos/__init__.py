"""The photos data set: real images of two classes that any machine can prepare in seconds."""
