"""Figures of what the benches recorded, and the page that holds them."""
