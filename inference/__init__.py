"""Using a trained network: image files in, class probabilities or features out. See docs/evaluation.md."""
