"""The method: plans, strategy, orders and the generation loop, on arrays and integers alone."""
