"""The reference of a KL divergence: hidden states on disk, or a second session in step."""
