"""Where rows come from: files, hub, stores; one pass over them."""
