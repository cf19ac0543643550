"""Starting many processes of one command."""
