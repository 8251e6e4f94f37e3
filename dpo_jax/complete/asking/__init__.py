"""Questions to endpoints and models: each answered once, whatever happens on the way."""
