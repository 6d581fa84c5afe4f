"""Side-by-side benchmark."""
