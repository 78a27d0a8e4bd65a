"""Questions that a decoder writes about passages, and a reader of full text answers (`refrag questions write`)."""
