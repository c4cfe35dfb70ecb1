"""What a measurement cost: time and memory."""
