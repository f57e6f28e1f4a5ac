"""What each verb does, for any recipe."""
