"""The verbs of the command line, one file each: a summary, the flags, and the job."""
