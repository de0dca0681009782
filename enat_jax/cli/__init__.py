"""The command line, one file a verb.

A verb has `define(values)`, which defines its flags, and `run(args, overrides)`, which does the job
with their values and the overrides of its config, and returns the exit code.
"""
