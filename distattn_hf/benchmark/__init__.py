"""Speed and memory beside the alternatives, measured in pairs after a check of correctness."""
