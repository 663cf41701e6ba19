"""Command lines: options with examples, errors of one line, and one command in several processes."""
