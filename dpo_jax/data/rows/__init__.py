"""What a row says: the layouts of published data, as messages, comparisons, dialogues."""
