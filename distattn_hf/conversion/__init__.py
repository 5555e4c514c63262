"""From checkpoint to converted model: plan, check, calibrate, convert, revert, report."""
