"""Emojiworld: the same things drawn by nine houses, from files to a table."""
