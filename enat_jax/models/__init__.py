"""The networks: pure maths on arrays, without config files and without sharding."""
