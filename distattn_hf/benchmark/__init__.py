"""Speed and memory beside what a user would pick instead, measured in pairs after a check of correctness."""
