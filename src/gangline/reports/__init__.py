"""Pages and pictures of recorded routing."""
