"""AutoNAT's search of strategies."""
