"""From sums over scored tokens to reported figures: NumPy and SciPy only."""
