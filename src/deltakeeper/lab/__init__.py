"""What trains: the embedded model, fine-tuning, alignment, attacks, and the synthetic tier."""
