"""From a checkpoint to a converted model: plan, check, calibrate, convert, revert, report."""
