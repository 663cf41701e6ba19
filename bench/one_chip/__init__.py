"""What top-k, packing and the stages of a layer cost on one chip: layout by layout, load by load."""
