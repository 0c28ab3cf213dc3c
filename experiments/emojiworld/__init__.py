"""Emojiworld: the same things in nine icon sets, from files to a table."""
