"""One HTML page of what a run left: no server, no script, nothing from the network (`puzzle.page.page.write_page`)."""
