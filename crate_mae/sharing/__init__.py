"""Models for others: folders with a model card, the Hugging Face Hub, and checkpoints that came from elsewhere."""
