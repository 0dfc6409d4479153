"""What makes a converted model work again: calibration and distillation."""
