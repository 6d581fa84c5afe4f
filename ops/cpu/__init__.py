"""The CPU lowering."""
