"""The system benches: what top-k, packing and the stages of a layer cost, layout by layout, load by load."""
