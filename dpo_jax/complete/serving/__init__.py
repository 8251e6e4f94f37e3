"""Models that answer whoever asks, while they are asked."""
