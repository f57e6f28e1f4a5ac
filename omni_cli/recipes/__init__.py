"""What is learned and how: siblings that do not know each other, found by name."""
