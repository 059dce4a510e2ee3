"""What a run leaves, its model card, and the push to the Hub."""
