"""Emojiworld: the same things in the styles of nine emoji vendors ("houses")."""
