"""Images and token records, from files to batches."""
