"""Training runs of generators and tokenizers."""
