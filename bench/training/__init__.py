"""The quality bench: a small transformer over bytes, trained with each router."""
