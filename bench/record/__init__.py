"""What a run leaves behind: JSON and its lines, tables, where figures come from, how far it is."""
