"""Data of the package: images, weights, and, in an installed package, the recipes and configurations."""
