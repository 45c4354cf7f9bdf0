"""What a model holds: adapters, owners, wrappers."""
