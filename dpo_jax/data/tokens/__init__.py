"""From messages to token ids: templates, what counts, what is cut."""
