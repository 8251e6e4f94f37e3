"""Judges that are asked: what they are asked, what their replies say; people too."""
